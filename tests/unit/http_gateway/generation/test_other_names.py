"""The table of names that other APIs have: what it advises is there."""

import re

import pytest

from quartet.http_gateway.anthropic.types import MessagesBody
from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.generation import other_names
from quartet.http_gateway.native.generate_body import GenerateBody
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.openai.types import ChatBody, CompletionBody
from quartet.http_gateway.routes.bodies import names_of, other_names_of

PATHS = {endpoint.path for endpoint in ENDPOINTS}
BODIES = (GenerateBody, CompletionBody, ChatBody, ResponsesBody, MessagesBody)


@pytest.mark.parametrize("kind", BODIES)
def test_every_name_that_is_advised_is_a_field_and_every_path_is_served(kind: type) -> None:
    for name, advice in other_names_of(kind).items():
        if found := re.fullmatch(r"use `(\w+)` of `sampling_params`", advice):
            assert found[1] in other_names.PARAMETERS, name
        elif found := re.fullmatch(r"use `(\w+)(\.\w+)?`", advice):
            assert found[1] in names_of(kind), name
        elif found := re.search(r"(/\S+)", advice):
            assert found[1].rstrip(",") in PATHS, name
        else:
            assert name == "sampling_params", advice


@pytest.mark.parametrize("kind", (CompletionBody, ChatBody, ResponsesBody, MessagesBody))
def test_every_native_parameter_is_a_field_or_refused(kind: type) -> None:
    left = set(other_names.PARAMETERS) - {"call_grammar"}  # the gateway's own
    assert left <= {*names_of(kind), *other_names_of(kind)}


@pytest.mark.parametrize("value", [None, False, "", [], {}, {"type": "text"}])
def test_what_asks_for_nothing(value: object) -> None:
    assert not other_names.asks("anything", value)


@pytest.mark.parametrize(("name", "value"), [("n", 1), ("frequency_penalty", 0), ("top_k", -1)])
def test_a_parameter_s_default_asks_for_nothing(name: str, value: object) -> None:
    assert not other_names.asks(name, value)
    assert other_names.asks("anything", value)


def test_zero_and_a_limit_that_another_api_has_as_its_default_ask_for_something() -> None:
    assert other_names.asks("seed", 0) and other_names.asks("max_new_tokens", 128)
