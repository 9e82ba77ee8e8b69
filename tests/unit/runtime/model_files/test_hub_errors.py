"""Each refusal of the hub is one line that says what to do."""

import httpx
import huggingface_hub
import pytest
from huggingface_hub import errors

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import hub
from quartet.runtime.model_files.hub_errors import explained
from tests.configs import resolved

NAME = "owner/name"
ANSWER = httpx.Response(403, request=httpx.Request("GET", "https://hub/owner/name"))


@pytest.mark.parametrize(
    ("kind", "token", "said"),
    [
        (errors.GatedRepoError, None, "is gated: accept its terms at https://huggingface.co/owner/name, then log in"),
        (errors.GatedRepoError, None, "`hf auth login`, or set HF_TOKEN"),
        (errors.GatedRepoError, "hf_x", "is gated, and your token has no access to it; accept its terms at https://"),
        (errors.RepositoryNotFoundError, None, "the hub shows none to you; check the name, or log in with"),
        (errors.RevisionNotFoundError, None, "has no revision v9; name a branch, tag or commit of it"),
    ],
)
def test_what_the_hub_refuses_is_said_with_the_way_in(monkeypatch, kind, token, said):
    def refuse(*_: object, **__: object) -> None:
        raise kind("403 Client Error.\n\nMany lines", response=ANSWER)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", refuse)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: token)
    with pytest.raises(StartupError) as refused:
        hub.find("--model-path", NAME, resolved(model_path=NAME, revision="v9"), hub.TOKENIZER)
    message = str(refused.value)
    assert message.startswith(f"--model-path {NAME} ") and said in message
    assert "hf_x" not in message and "\n" not in message


def test_without_a_network_the_cause_is_said_in_one_line():
    message = explained("--model-path", NAME, None, errors.LocalEntryNotFoundError("no route\nto the hub"))
    assert "could not be fetched from the hub (LocalEntryNotFoundError: no route); check the name" in message
