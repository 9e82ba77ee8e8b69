"""What all schedulers must serve is a function of the commands, and so is what brings a scheduler there."""

from typing import Any

import msgspec
import pytest

from quartet.http_gateway.ring.decided import REMEMBERED, Decided, Served
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import (
    REWRITTEN,
    ContinueGeneration,
    ControlCommand,
    FlushCache,
    PauseGeneration,
    ReleaseMemory,
    ResumeMemory,
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
        (PauseGeneration(), Served("m", "v0", frozenset({A}), paused=True)),
        (ContinueGeneration(), FIRST.served),
        (
            UpdateWeightsFromDisk(model_path="n", weight_version="v1", keep_pause=True),
            Served("n", "v1", frozenset({A}), paused=True),
        ),
        (ReleaseMemory(tags=["kv_cache"]), Served("m", "v0", frozenset({A}), released=frozenset({"kv_cache"}))),
        (ReleaseMemory(), Served("m", "v0", frozenset({A}), released=frozenset({"kv_cache", "weights"}))),
        (ReleaseMemory(tags=["cuda_graph"]), FIRST.served),
        (ResumeMemory(), FIRST.served),
    ],
)
def test_each_command_decides_what_it_asks_for(command: ControlCommand, served: Served) -> None:
    assert FIRST.after(command).served == served


def test_a_pause_and_released_memory_last_until_they_are_ended() -> None:
    resting = after(
        PauseGeneration(), ReleaseMemory(), UpdateWeightVersion(new_version="v1"), PauseGeneration(mode="abort")
    )
    assert resting.served.rest == (True, frozenset({"weights", "kv_cache"}))
    one_back = resting.after(ResumeMemory(tags=["weights"]))
    assert one_back.served.rest == (True, frozenset({"kv_cache"}))
    assert one_back.after(ResumeMemory(tags=["kv_cache", "unknown"])) == one_back, "it is refused"
    assert one_back.after(ResumeMemory()).after(ContinueGeneration()).served.rest == (False, frozenset())


def test_who_comes_back_awake_rests_first_and_who_has_to_go_on_does_so_last() -> None:
    other = Served("n", "v9", frozenset({("b", "/b", False)}))
    resting = after(PauseGeneration(), ReleaseMemory(tags=["kv_cache"]))
    kinds = [type(command) for command in missing(resting, other)]
    assert kinds == [PauseGeneration, UpdateWeightsFromDisk, UnloadAdapter, LoadAdapter, ReleaseMemory]
    assert not resting.may_be_asked(FIRST.served)
    asleep = msgspec.structs.replace(other, paused=True, released=frozenset({"weights", "kv_cache"}))
    kinds = [type(command) for command in missing(FIRST, asleep)]
    assert kinds == [ResumeMemory, UpdateWeightsFromDisk, UnloadAdapter, LoadAdapter, ContinueGeneration]
    assert not FIRST.may_be_asked(msgspec.structs.replace(FIRST.served, paused=True))


def test_weights_are_not_read_while_their_memory_is_to_be_released() -> None:
    resting = after(ReleaseMemory(tags=["weights"]))
    own = msgspec.structs.replace(resting.served, weight_version="v9")
    assert missing(resting, own) == []
    awake = msgspec.structs.replace(own, released=frozenset())
    assert [type(command) for command in missing(resting, awake)] == [UpdateWeightsFromDisk, ReleaseMemory]


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
    named = after(UpdateWeightVersion(new_version="v1"), PauseGeneration())
    for version in ("v0", "v1", REWRITTEN.format("v0"), REWRITTEN.format("v1")):
        own = Served("m", version, frozenset({A}), weight_files="new")
        assert named.is_rewritten(own) and not named.may_be_asked(own)
        kinds = [type(command) for command in missing(named, own)]
        if named.is_newer(own):
            assert kinds == [PauseGeneration], "but it is paused with the others"
        else:
            assert kinds == [PauseGeneration, UpdateWeightsFromDisk], "the path may lead elsewhere by now"
    assert not named.is_rewritten(Served("m", REWRITTEN.format("v2"), weight_files="new"))
    assert not named.is_rewritten(Served("other", "v1", weight_files="new"))


def test_weights_of_an_update_are_those_that_all_have_read_and_whoever_reads_them_later_must_find_them() -> None:
    decided = FIRST.after(UpdateWeightsFromDisk(model_path="n", weight_version="v1"), "read by all")
    assert decided.served.weights == ("n", "v1", "read by all")
    [update] = missing(decided, FIRST.served)
    assert isinstance(update, UpdateWeightsFromDisk) and update.weight_files == "read by all"


def test_rewritten_weights_of_all_get_their_name_with_their_files() -> None:
    named = FIRST.after(UpdateWeightVersion(new_version="v1"), "new")
    assert named.may_be_asked(Served("m", "v1", frozenset({A}), "new"))
    own = Served("m", REWRITTEN.format("v0"), frozenset({A}), "new")
    assert missing(named, own) == [UpdateWeightVersion(new_version="v1", abort_all_requests=False)]


def test_rewritten_weights_of_all_may_get_the_name_of_those_before() -> None:
    named = FIRST.after(UpdateWeightVersion(new_version="v0"), "new")
    assert named.may_be_asked(Served("m", "v0", frozenset({A}), "new"))
    assert not named.may_be_asked(FIRST.served)
    assert FIRST.after(UpdateWeightVersion(new_version="v0")) == FIRST


def test_who_was_not_there_for_an_update_through_a_link_that_leads_elsewhere_now_reads_it() -> None:
    updated = FIRST.after(UpdateWeightsFromDisk(model_path="m"), "new")
    own = Served("m", "v0", frozenset({A}), "old")
    assert missing(updated, own) == [UpdateWeightsFromDisk(model_path="m", weight_version="v0", weight_files="new")]


def test_memory_that_no_scheduler_could_take_again_is_still_lacking() -> None:
    lacking, there = {"paused": False, "lacks": ["weights"], "asleep": True}, {"paused": False, "lacks": []}
    shown = FIRST.shown(lacking, lacking)
    assert (shown["lacks"], shown["asleep"]) == (["weights"], True)
    shown = FIRST.shown(lacking, there)
    assert (shown["lacks"], shown["asleep"]) == ([], False)


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
    rest = {"paused": False, "lacks": [], "asleep": False}
    assert FIRST.shown(state) == {"model_path": "m", "weight_version": "v0", "adapters": [adapter], **rest}
    resting = after(PauseGeneration(), ReleaseMemory(tags=["weights"]))
    shown = resting.shown({"paused": False, "lacks": [], "asleep": False})
    assert (shown["paused"], shown["lacks"], shown["asleep"]) == (True, ["weights"], True)
    assert FIRST.shown({"paused": False, "lacks": [], "asleep": True})["asleep"], "its weights have still to be written"
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
