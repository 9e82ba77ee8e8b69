"""What all schedulers must serve is a function of the commands, and so is what brings a scheduler there."""

from typing import Any

import msgspec
import pytest

from quartet.http_gateway.ring.decided import REMEMBERED, Decided, Served
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import (
    REWRITTEN,
    ControlCommand,
    FlushCache,
    PauseGeneration,
    ReleaseMemory,
    UpdateWeightsFromDisk,
    UpdateWeightVersion,
)

A, B = ("a", "/a", False), ("b", "/b", True)
FIRST = Decided(Served("m", "v0", frozenset({A})))


def after(*commands: ControlCommand) -> Decided:
    decided = FIRST
    for command in commands:
        decided = decided.after(command)
    return decided


def missing(decided: Decided, own: Served) -> list[ControlCommand]:
    return list(decided.missing(own))


@pytest.mark.parametrize(
    ("command", "served"),
    [
        (UpdateWeightsFromDisk(model_path="n", weight_version="v1"), Served("n", "v1", frozenset({A}))),
        (UpdateWeightsFromDisk(model_path="n"), Served("n", "v0", frozenset({A}))),
        (UpdateWeightVersion(new_version="v1"), Served("m", "v1", frozenset({A}))),
        (LoadAdapter(lora_name="b", lora_path="/b", pinned=True), Served("m", "v0", frozenset({A, B}))),
        (LoadAdapter(lora_name="a", lora_path="/c"), Served("m", "v0", frozenset({("a", "/c", False)}))),
        (UnloadAdapter(lora_name="a"), Served("m", "v0")),
        (UnloadAdapter(lora_name="b"), FIRST.served),
        (FlushCache(), FIRST.served),
        (PauseGeneration(), FIRST.served),
    ],
)
def test_each_command_decides_what_it_asks_for(command: ControlCommand, served: Served) -> None:
    assert FIRST.after(command).served == served


def test_whoever_serves_what_was_decided_lacks_nothing_and_may_be_asked() -> None:
    decided = after(
        UpdateWeightsFromDisk(model_path="n", weight_version="v1"), LoadAdapter(lora_name="b", lora_path="/b")
    )
    assert missing(decided, decided.served) == []
    assert decided.may_be_asked(decided.served)


def test_other_weights_are_read_and_other_names_of_the_same_ones_given() -> None:
    named = after(
        UpdateWeightsFromDisk(model_path="n", weight_version="v1", load_format="gguf"),
        UpdateWeightVersion(new_version="v2"),
        UpdateWeightVersion(new_version="v3"),
    )
    read = UpdateWeightsFromDisk(model_path="n", weight_version="v3", load_format="gguf")
    name = UpdateWeightVersion(new_version="v3", abort_all_requests=False)
    for path, version, command in (("m", "v3", read), ("n", "v0", read), ("n", "v1", name), ("n", "v2", name)):
        own = Served(path, version, frozenset({A}))
        assert missing(named, own) == [command]
        assert not named.may_be_asked(own)


def test_a_directory_that_was_written_again_since_is_noticed_under_every_name_of_its_weights() -> None:
    named = after(UpdateWeightVersion(new_version="v1"))
    for version in ("v0", "v1"):
        assert named.is_rewritten(Served("m", REWRITTEN.format(version)))
    assert not named.is_rewritten(Served("m", REWRITTEN.format("v2")))


def test_adapters_are_unloaded_loaded_and_replaced() -> None:
    decided = after(LoadAdapter(lora_name="b", lora_path="/b", pinned=True))
    own = Served("m", "v0", frozenset({("a", "/other", False), ("c", "/c", False)}))
    assert missing(decided, own) == [
        UnloadAdapter(lora_name="c"),
        LoadAdapter(lora_name="a", lora_path="/a", load_inplace=True),
        LoadAdapter(lora_name="b", lora_path="/b", pinned=True, load_inplace=True),
    ]


def test_who_has_an_adapter_too_many_may_be_asked_and_who_lacks_one_may_not() -> None:
    assert FIRST.may_be_asked(Served("m", "v0", frozenset({A, B})))
    assert not FIRST.may_be_asked(Served("m", "v0", frozenset({B})))
    assert not FIRST.may_be_asked(Served("m", "v0", frozenset({("a", "/other", False)})))


def test_of_what_one_says_clients_hear_what_was_decided() -> None:
    adapter = {"name": "a", "path": "/a", "version": "7", "rank": 8, "pinned": False, "loaded": True}
    state = {"model_path": "n", "weight_version": "v9", "paused": True, "adapters": [adapter]}
    assert FIRST.shown(state) == {"model_path": "m", "weight_version": "v0", "paused": True, "adapters": [adapter]}
    assert FIRST.shown({}) == {"model_path": "m", "weight_version": "v0"}


def test_clients_hear_of_the_adapters_that_were_decided_as_far_as_any_scheduler_has_them() -> None:
    def state(*adapters: tuple[str, str, bool]) -> dict[str, Any]:
        entries = [{"name": name, "path": path, "pinned": pinned, "loaded": True} for name, path, pinned in adapters]
        return {"adapters": entries}

    def shown(*states: dict[str, Any]) -> list[tuple[str, str, bool]]:
        return [(one["name"], one["path"], one["pinned"]) for one in decided.shown(*states)["adapters"]]

    decided = after(LoadAdapter(lora_name="b", lora_path="/b", pinned=True))
    assert shown(state(A, B)) == [A, B]
    assert shown(state(("c", "/c", False)), state(B, A)) == [B, A]
    assert shown(state(B), state(("c", "/c", False))) == [B]
    assert shown(state(B), state(("a", "/old", False))) == [B, A], "one that is to be replaced can be named"


def test_the_last_changes_are_remembered_whatever_they_change() -> None:
    commands = [ReleaseMemory(id=str(number), waits_for_others=True) for number in range(REMEMBERED + 1)]
    assert after(*commands).changes == tuple(str(number) for number in range(1, REMEMBERED + 1))
    update = UpdateWeightsFromDisk(id="u", model_path="n", waits_for_others=True)
    assert after(commands[0], update, UnloadAdapter(id="a", lora_name="a")).changes == ("0", "u")


def test_a_record_of_it_is_the_same_when_it_is_read() -> None:
    decided = after(UpdateWeightVersion(new_version="v1"), LoadAdapter(lora_name="b", lora_path="/b", pinned=True))
    assert msgspec.json.decode(msgspec.json.encode(decided), type=Decided) == decided
