"""Which of several schedulers gets a request, and what is known of each."""

import asyncio
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.ring import prefix_memory
from quartet.http_gateway.ring.decided import Decided, Served
from quartet.http_gateway.ring.prefix_memory import BLOCK_BYTES, MOST_BLOCKS, PrefixMemory, PromptBlocks, blocks_of
from quartet.http_gateway.ring.schedulers import MOST_MORE_REQUESTS, Schedulers
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import PauseGeneration, UpdateWeightsFromDisk, UpdateWeightVersion
from quartet.runtime.messages import Chat, Facts, Generate, Request, pack_ids
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import asynchronous

LONG = "a long story " * 100


def asked(text: str = "hi", **fields: Any) -> Generate:
    return Generate(request=Request(rid="r", params=SamplingParams(), **fields), text=text)


ADAPTER = {"name": "a", "path": "/a", "version": "1", "rank": 4, "pinned": False, "loaded": True}


def facts(
    rank: int, epoch: int = 0, version: str = "v0", path: str = "m", adapters: Sequence[Any] = (), **state: Any
) -> Facts:
    return Facts(
        rank=rank,
        epoch=epoch,
        max_total_num_tokens=100 - rank,
        max_req_input_len=90,
        context_length=100,
        vocab_size=10,
        state={"model_path": path, "weight_version": version, "adapters": list(adapters), **state},
    )


def heard(count: int = 2, run_dir: str = "") -> Schedulers:
    schedulers = Schedulers(count, run_dir)
    for rank in range(count):
        schedulers.note_facts(facts(rank), facts(rank))
    return schedulers


def test_requests_without_a_known_beginning_go_where_least_is_to_do() -> None:
    schedulers = heard()
    assert [schedulers.choose(asked(str(number))) for number in range(4)] == [0, 1, 0, 1]
    schedulers.release(1)
    assert schedulers.choose(asked("x")) == 1


def test_a_known_beginning_draws_a_request_until_there_is_much_more_to_do() -> None:
    schedulers = heard()
    first = schedulers.choose(asked(LONG))
    for _ in range(MOST_MORE_REQUESTS):
        assert schedulers.choose(asked(LONG + "and on")) == first
    assert schedulers.choose(asked(LONG + "and on")) != first


def test_a_beginning_that_is_a_small_part_of_a_prompt_counts_only_if_it_is_long() -> None:
    schedulers = heard()
    short, long = "s" * BLOCK_BYTES, "l" * (16 * BLOCK_BYTES)
    where = schedulers.choose(asked(short))
    assert schedulers.choose(asked(short + LONG)) != where
    where = schedulers.choose(asked(long))
    assert schedulers.choose(asked(long + LONG * 20)) == where


def test_another_namespace_has_other_beginnings() -> None:
    same = {tuple(blocks_of(asked(LONG))), tuple(blocks_of(asked(LONG)))}
    assert len(same) == 1
    others = [blocks_of(asked(LONG, extra_key="k")), blocks_of(asked(LONG, adapter="a")), blocks_of(asked("x" + LONG))]
    assert all(tuple(blocks) not in same for blocks in others)


def test_copies_of_a_prompt_are_hashed_once_and_others_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    hashed: list[Generate] = []

    def noted(generate: Generate) -> list[int]:
        hashed.append(generate)
        return blocks_of(generate)

    monkeypatch.setattr(prefix_memory, "blocks_of", noted)
    prompts, first = PromptBlocks(), asked(LONG)
    copy = msgspec.structs.replace(first, request=msgspec.structs.replace(first.request, rid="s"))
    other = msgspec.structs.replace(first, request=msgspec.structs.replace(first.request, extra_key="k"))
    found = [prompts.of(generate) for generate in (first, copy, other, asked("x"))]
    assert hashed == [first, other, asked("x")]
    assert found == [blocks_of(generate) for generate in (first, copy, other, asked("x"))]


def test_the_client_chooses_as_long_as_that_scheduler_serves() -> None:
    schedulers = heard()
    assert [schedulers.choose(asked(wanted_rank=1)) for _ in range(3)] == [1, 1, 1]
    schedulers.note_death(1, 0)
    assert schedulers.choose(asked(wanted_rank=1)) == 0


def test_prompts_of_every_kind_have_blocks_and_no_more_than_a_bound() -> None:
    request = Request(rid="r", params=SamplingParams())
    messages = [{"role": "user", "content": LONG}, {"role": "assistant", "content": LONG}]
    one, two = (Generate(request=request, chat=Chat(messages=messages[:n])) for n in (1, 2))
    assert blocks_of(two)[: len(blocks_of(one))] == blocks_of(one) != []
    assert len(blocks_of(Generate(request=request, input_ids=pack_ids(range(BLOCK_BYTES))))) == 4
    assert len(blocks_of(asked("x" * (2 * MOST_BLOCKS * BLOCK_BYTES)))) == MOST_BLOCKS
    assert blocks_of(Generate(request=request, chat=Chat(messages=[{"role": "user", "content": 1 << 70}]))) == []


def test_what_was_used_longest_ago_is_forgotten_ends_before_beginnings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(prefix_memory, "REMEMBERED_BLOCKS", 4)
    memory = PrefixMemory()
    memory.add([1, 2, 3])
    memory.add([7, 8])
    assert (memory.match([1, 2, 3]), memory.match([7, 8])) == (2, 2)


def test_a_death_is_news_once_and_of_the_present_incarnation_only() -> None:
    schedulers = heard()
    assert not schedulers.note_death(0, 1)
    assert schedulers.note_death(0, 0)
    assert not schedulers.note_death(0, 0)
    assert not schedulers.note_death(1, 0)  # nobody is left to go on
    assert schedulers.targets == [0, 1]


UPDATE = UpdateWeightsFromDisk(model_path="n", weight_version="v1")
LOAD, UNLOAD = LoadAdapter(lora_name="a", lora_path="/a"), UnloadAdapter(lora_name="a")


def says(schedulers: Schedulers, told: Facts) -> bool:
    return schedulers.note_facts(told, schedulers.common(told))


def test_a_scheduler_with_other_weights_gets_no_requests() -> None:
    schedulers = heard()
    assert schedulers.decide(UPDATE)
    says(schedulers, facts(0, version="v1", path="n"))
    assert {schedulers.choose(asked(str(number))) for number in range(4)} == {0}
    says(schedulers, facts(1, version="v1", path="n"))
    assert schedulers.choose(asked("x")) == 1
    assert says(schedulers, facts(1, epoch=1))
    assert schedulers.is_behind(1)
    assert not schedulers.is_behind(0)
    assert schedulers.choose(asked("y", wanted_rank=1)) == 0


def test_those_that_are_about_to_change_get_requests_as_long_as_nobody_has() -> None:
    schedulers = heard(3)
    schedulers.changes = {1, 2}.__contains__
    schedulers.decide(UPDATE)
    assert [one.rank for one in schedulers.serving()] == [1, 2]
    schedulers.note_death(2, 0)
    assert [one.rank for one in schedulers.serving()] == [1]
    says(schedulers, facts(0, version="v1", path="n"))
    assert [one.rank for one in schedulers.serving()] == [0]
    schedulers.note_death(0, 0)
    schedulers.changes = lambda rank: False
    assert [one.rank for one in schedulers.serving()] == [0, 2], "those that will be back"


def test_a_scheduler_that_lacks_an_adapter_gets_no_requests_and_one_with_too_many_does() -> None:
    schedulers = heard()
    schedulers.decide(LOAD)
    says(schedulers, facts(0, adapters=[ADAPTER]))
    assert {schedulers.choose(asked(str(number))) for number in range(4)} == {0}
    says(schedulers, facts(1, adapters=[ADAPTER | {"loaded": False, "version": "3"}]))
    assert not schedulers.is_behind(0) and not schedulers.is_behind(1)
    schedulers.decide(UNLOAD)
    assert schedulers.is_behind(0) and schedulers.is_behind(1)
    assert len(schedulers.serving()) == 2


def test_a_scheduler_that_does_not_rest_with_the_others_gets_no_requests() -> None:
    schedulers = heard()
    schedulers.decide(PauseGeneration())
    says(schedulers, facts(0, paused=True))
    assert schedulers.left_out == [1]
    assert {schedulers.choose(asked(str(number))) for number in range(4)} == {0}
    says(schedulers, facts(1, paused=True))
    assert schedulers.choose(asked("x")) == 1
    assert schedulers.common(facts(1, epoch=1, paused=False)).state["paused"], "clients hear of what was decided"


def test_where_all_serve_something_else_those_that_serve_the_same_get_the_requests() -> None:
    schedulers = heard(3)
    for rank, files in enumerate(("x", "y", "x")):
        says(schedulers, facts(rank, version="v0-rewritten", weight_files=files))
    assert [one.rank for one in schedulers.serving()] == [0, 2]
    assert schedulers.left_out == [1]
    shown = schedulers.common(facts(1, version="v0-rewritten", weight_files="y")).state
    assert shown["weight_version"] == "v0-rewritten", "which is what clients get"
    assert schedulers.targets_of(UpdateWeightVersion(new_version="v1")) == [0, 2]
    schedulers.decide(UpdateWeightVersion(new_version="v1"))
    assert schedulers.decided is not None and schedulers.decided.served.weights == ("m", "v1", "x")


def test_what_was_decided_is_so_whoever_says_something_else() -> None:
    schedulers = heard()
    schedulers.decide(LOAD)
    schedulers.note_death(0, 0)
    for told in (facts(1), facts(1, version="v9"), facts(0, epoch=1), facts(1, epoch=1, adapters=[])):
        says(schedulers, told)
        assert schedulers.decided == Decided(Served("m", "v0", frozenset({("a", "/a", False)})))
        assert schedulers.is_behind(told.rank)


def test_a_request_stays_where_its_adapter_is_while_that_is_unloaded() -> None:
    schedulers = heard()
    schedulers.decide(LOAD)
    for rank in (0, 1):
        says(schedulers, facts(rank, adapters=[ADAPTER]))
    named = asked(adapter="a", wanted_rank=1)
    assert schedulers.choose(named) == 1
    schedulers.note_death(1, 0)
    schedulers.release(1)
    assert schedulers.choose_again(named, 1) == 0, "all serve it: another one goes on"
    schedulers.release(0)
    schedulers.decide(UNLOAD)
    assert schedulers.choose_again(named, 1) == 1, "the others may have forgotten it"
    assert schedulers.choose_again(asked("base"), 1) == 0
    assert [one.requests for one in schedulers.all] == [1, 1]


def test_the_next_gateway_goes_on_with_what_was_decided_whatever_it_hears(tmp_path: Path) -> None:
    before = heard(run_dir=str(tmp_path))
    before.decide(UPDATE)
    before.decide(LOAD)
    after = heard(run_dir=str(tmp_path))
    assert after.decided == before.decided
    assert after.is_behind(0) and after.is_behind(1)


def test_the_first_one_that_speaks_says_what_all_must_serve_where_nothing_was_decided() -> None:
    schedulers = Schedulers(2)
    assert not schedulers.decide(UPDATE), "nothing is known that it could change"
    for rank, version in enumerate(("v1", "v2")):
        says(schedulers, facts(rank, version=version))
    assert schedulers.decided == Decided(Served("m", "v1"))
    assert schedulers.is_behind(1) and not schedulers.is_behind(0)


def test_one_scheduler_has_nobody_to_be_like() -> None:
    schedulers = heard(1)
    assert not schedulers.decide(UPDATE)
    told = facts(0, version="v2")
    assert schedulers.common(told) == told
    assert not schedulers.is_behind(0)


@asynchronous
async def test_a_command_waits_until_all_live_at_once() -> None:
    schedulers = heard()
    schedulers.note_death(0, 0)
    waiting = asyncio.create_task(schedulers.complete())
    await asyncio.sleep(0)
    says(schedulers, facts(0, epoch=1))
    schedulers.note_death(1, 0)  # before the waiting one goes on
    for _ in range(3):
        await asyncio.sleep(0)
    assert not waiting.done()
    says(schedulers, facts(1, epoch=1))
    await waiting


def test_what_is_told_of_sizes_holds_for_all() -> None:
    schedulers = heard()
    assert schedulers.common(facts(0)).max_total_num_tokens == 99
