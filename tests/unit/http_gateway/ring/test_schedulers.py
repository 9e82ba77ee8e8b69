"""Which of several schedulers gets a request, and what is known of each."""

from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.ring import prefix_memory
from quartet.http_gateway.ring.prefix_memory import BLOCK_BYTES, MOST_BLOCKS, PrefixMemory, PromptBlocks, blocks_of
from quartet.http_gateway.ring.schedulers import MOST_MORE_REQUESTS, Schedulers, Served
from quartet.runtime.messages import Chat, Facts, Generate, Reply, Request, pack_ids
from quartet.runtime.sampling import SamplingParams

LONG = "a long story " * 100


def asked(text: str = "hi", **fields: Any) -> Generate:
    return Generate(request=Request(rid="r", params=SamplingParams(), **fields), text=text)


def facts(rank: int, epoch: int = 0, version: str = "v0") -> Facts:
    return Facts(
        rank=rank,
        epoch=epoch,
        max_total_num_tokens=100 - rank,
        max_req_input_len=90,
        context_length=100,
        vocab_size=10,
        state={"model_path": "m", "weight_version": version},
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


def test_a_scheduler_with_other_weights_gets_no_requests() -> None:
    schedulers = heard()
    schedulers.note_reply(Reply(id="c", rank=0, body={"weight_version": "v1"}))
    assert {schedulers.choose(asked(str(number))) for number in range(4)} == {0}
    schedulers.note_reply(Reply(id="c", rank=1, body={"weight_version": "v1"}))
    assert schedulers.choose(asked("x")) == 1
    assert schedulers.note_facts(facts(1, epoch=1), facts(1, epoch=1))
    assert schedulers.is_behind(1)
    assert not schedulers.is_behind(0)
    assert schedulers.choose(asked("y", wanted_rank=1)) == 0


def test_a_scheduler_with_other_adapters_gets_no_requests() -> None:
    schedulers = heard()
    adapter = {"name": "a", "path": "/a", "version": "1", "rank": 4, "pinned": False, "loaded": True}
    schedulers.note_reply(Reply(id="c", rank=0, body={"adapters": [adapter]}))
    assert {schedulers.choose(asked(str(number))) for number in range(4)} == {0}
    evicted = adapter | {"loaded": False, "version": "3"}
    schedulers.note_reply(Reply(id="c", rank=1, body={"adapters": [evicted]}))
    assert not schedulers.is_behind(0)
    assert not schedulers.is_behind(1)


def test_a_command_for_all_holds_though_only_one_that_is_levelled_has_answered() -> None:
    schedulers = heard()
    adapter = {"name": "a", "path": "/a", "version": "1", "rank": 4, "pinned": False, "loaded": True}
    loaded, unloaded = Reply(id="c", rank=1, body={"adapters": [adapter]}), Reply(id="d", rank=1, body={"adapters": []})
    schedulers.all[1].levelled = True  # what it says does not hold for all by itself
    schedulers.note_death(0, 0)
    for answer, expected in ((loaded, {("a", "/a", False)}), (unloaded, set())):
        schedulers.note_reply(answer)
        schedulers.note_adapter("a", answer)
        assert schedulers.reference is not None
        assert schedulers.reference.adapters == expected
        assert not schedulers.is_behind(1)


def test_a_request_stays_where_its_adapter_is_while_that_is_unloaded() -> None:
    schedulers = heard()
    adapter = {"name": "a", "path": "/a", "version": "1", "rank": 4, "pinned": False, "loaded": True}
    for rank in (0, 1):
        schedulers.note_reply(Reply(id="c", rank=rank, body={"adapters": [adapter]}))
    named = asked(adapter="a", wanted_rank=1)
    assert schedulers.choose(named) == 1
    schedulers.note_death(1, 0)
    schedulers.release(1)
    assert schedulers.choose_again(named, 1) == 0, "all serve it: another one goes on"
    schedulers.release(0)
    schedulers.note_reply(Reply(id="c", rank=0, body={"adapters": []}))
    assert schedulers.choose_again(named, 1) == 1, "the others may have forgotten it"
    assert schedulers.choose_again(asked("base"), 1) == 0
    assert [one.requests for one in schedulers.all] == [1, 1]


def test_facts_may_tell_of_a_change_before_its_lost_reply_is_repeated() -> None:
    schedulers = heard()
    schedulers.note_facts(facts(0, version="v1"), facts(0))
    assert schedulers.is_behind(1)
    assert not schedulers.is_behind(0)


def test_who_repeats_that_it_is_behind_does_not_speak_for_all() -> None:
    schedulers = heard()
    schedulers.note_death(1, 0)
    schedulers.begin_change()
    schedulers.note_facts(facts(1, epoch=1), schedulers.common(facts(1, epoch=1)))
    changed = Reply(id="c", rank=0, body={"weight_version": "v1"})
    schedulers.note_reply(changed)
    assert schedulers.common(facts(1, epoch=1)).state == {}  # said again, as a service asked for it
    assert schedulers.common(facts(0, version="v1")).state["weight_version"] == "v1"
    assert schedulers.common(facts(1, epoch=0)).state == {}  # of the incarnation that is dead


def test_the_next_gateway_knows_which_weights_all_serve(tmp_path: Path) -> None:
    schedulers = heard(run_dir=str(tmp_path))
    schedulers.note_reply(Reply(id="c", rank=0, body={"weight_version": "v1"}))
    after = heard(run_dir=str(tmp_path))
    assert after.reference == Served("m", "v1")
    assert after.is_behind(0)


def test_who_is_behind_and_takes_an_adapter_does_not_turn_the_weights_back() -> None:
    one, other = ({"name": "a", "path": path, "version": "1", "rank": 1, "pinned": False} for path in ("p", "q"))
    schedulers = heard()
    schedulers.note_reply(Reply(id="c", rank=1, body={"weight_version": "v1", "adapters": [one]}))
    schedulers.note_reply(Reply(id="d", rank=0, body={"adapters": [other]}))
    assert schedulers.reference == Served("m", "v1", frozenset({("a", "q", False)}))
    assert schedulers.is_behind(0)
    schedulers.note_reply(Reply(id="d", rank=1, body={"adapters": [other]}))
    assert not schedulers.is_behind(1)
    schedulers.note_reply(Reply(id="e", rank=0, body={"adapters": []}))
    assert schedulers.reference == Served("m", "v1")


def test_a_reply_to_the_gateway_before_takes_no_adapters_away(tmp_path: Path) -> None:
    adapter = {"name": "a", "path": "p", "version": "1", "rank": 1, "pinned": False, "loaded": True}
    before = heard(run_dir=str(tmp_path))
    for rank in (0, 1):
        before.note_reply(Reply(id="c", rank=rank, body={"adapters": [adapter]}))
    schedulers = Schedulers(2, str(tmp_path))
    schedulers.note_reply(Reply(id="d", rank=1, body={"weight_version": "v1"}))
    assert schedulers.reference == Served("m", "v1", frozenset({("a", "p", False)}))
    for rank in (0, 1):
        told = facts(rank, version="v1")
        told.state["adapters"] = [adapter]
        schedulers.note_facts(told, told)
        assert not schedulers.is_behind(rank)


def test_a_reply_before_anything_is_known_says_nothing() -> None:
    schedulers = Schedulers(2)
    schedulers.note_reply(Reply(id="d", rank=1, body={"weight_version": "v1"}))
    assert schedulers.reference is None


def test_what_is_told_of_sizes_holds_for_all() -> None:
    schedulers = heard()
    assert schedulers.common(facts(0)).max_total_num_tokens == 99
