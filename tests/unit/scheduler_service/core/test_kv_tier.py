"""The books of the tier behind the KV pool, under a planner whose fake model reads its prefix through the pages."""

import random
from array import array

import pytest

from quartet.runtime.errors import RequestError
from quartet.scheduler_service.core.kv_tier import MOST_FETCHES, KvTier
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.snapshots import SnapshotOptions
from quartet.scheduler_service.core.tier_acts import Store
from tests.stepper import Stepper, expected_output, tokenized
from tests.tier_rig import FakeStore, serve, sizes

PROMPT = list(range(10, 50))  # five blocks
OTHER = list(range(100, 140))
OPERATIONS = 6_000


def rig(draw: random.Random | None = None, pool_tokens: int = 48, **tier_sizes: int) -> tuple[Stepper, FakeStore]:
    """A pool that holds one prompt at a time, in pages of 4 tokens."""
    stepper = Stepper(page_size=4, total_pages=pool_tokens // 4, context_length=150)
    return stepper, FakeStore(stepper, sizes(**tier_sizes), draw)


def recurrent(draw: random.Random | None = None, snapshots: int = 6, **tier_sizes: int) -> tuple[Stepper, FakeStore]:
    """The same of a model with recurrent layers, whose states have two pieces."""
    stepper = Stepper(page_size=4, total_pages=12, context_length=150, snapshots=SnapshotOptions(snapshots, 16))
    return stepper, FakeStore(stepper, sizes(state_pieces=2, **tier_sizes), draw)


def ask(stepper: Stepper, store: FakeStore, rid: str, prompt: list[int], **request: str) -> int:
    """How many tokens of the prompt were cached; the answer must be right."""
    stepper.add(tokenized(rid, prompt, 3, **request))
    serve(stepper, store)
    assert stepper.output(rid) == expected_output(prompt, 3)
    return stepper.updates[rid][0].sequence.cached_tokens


@pytest.mark.parametrize("levels", [{}, {"memory_blocks": 20, "file_blocks": 0}, {"memory_blocks": 20}])
def test_an_evicted_prefix_comes_back_and_counts_as_cached(levels: dict[str, int]) -> None:
    stepper, store = rig(**levels)
    assert ask(stepper, store, "a", PROMPT) == 0
    assert ask(stepper, store, "b", OTHER) == 0  # takes the pages of the first
    assert stepper.planner.pool.tree.evicted > 0
    assert ask(stepper, store, "c", PROMPT) == 32  # whole blocks in front of the last token
    assert store.tier.restored > 0


@pytest.mark.parametrize("levels", [{}, {"memory_blocks": 30, "file_blocks": 0}, {"memory_blocks": 30}])
def test_a_recurrent_state_comes_back_with_its_prefix(levels: dict[str, int]) -> None:
    stepper, store = recurrent(**levels)
    assert ask(stepper, store, "a", PROMPT) == 0
    assert ask(stepper, store, "b", OTHER) == 0
    assert ask(stepper, store, "c", [*PROMPT, 7, 8, 9]) == 32, "up to the last border of a block in front of the end"
    stepper.planner.pool.clear()
    assert ask(stepper, store, "d", [*PROMPT[:20], 7, 8, 9]) == 16, "up to the last one that has its state"


def test_blocks_without_a_state_are_not_fetched() -> None:
    stepper, store = recurrent()
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    assert ask(stepper, store, "b", [*PROMPT[:10], 7, 8, 9]) == 0
    assert store.tier.restored == 0


def test_a_state_for_which_no_snapshot_is_free_is_computed() -> None:
    stepper, store = recurrent()
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    stepper.planner.pool.snapshots.take = lambda: None  # type: ignore[method-assign]
    assert ask(stepper, store, "b", PROMPT) == 0


def test_a_damaged_piece_of_a_state_is_forgotten() -> None:
    stepper, store = recurrent()
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    assert len(store.files) == 5 + 2 * 2  # states behind 16 and 32 tokens
    store.spoilt.add(next(key for key in store.files if len(store.files[key]) == 16))  # half of the second state
    assert ask(stepper, store, "b", PROMPT) == 16
    assert store.tier.damaged == 1


def test_a_prefix_whose_files_are_gone_is_written_again_at_once() -> None:
    stepper, store = rig()
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    store.spoilt.update(store.files)
    assert ask(stepper, store, "b", PROMPT) == 0
    stepper.planner.pool.clear()
    assert ask(stepper, store, "c", PROMPT) == 32


def test_a_prefix_longer_than_one_fetch_comes_in_several() -> None:
    stepper, store = rig(most_fetched=1)
    ask(stepper, store, "a", PROMPT)
    ask(stepper, store, "b", OTHER)
    fetched = store.tier.restored
    assert ask(stepper, store, "c", PROMPT) >= 32
    assert store.tier.restored - fetched > 2


def test_another_namespace_never_matches() -> None:
    stepper, store = rig(pool_tokens=400)
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    assert ask(stepper, store, "b", PROMPT, extra_key="x") == 0
    stepper.planner.pool.clear()
    assert ask(stepper, store, "c", PROMPT) > 0


def test_versions_of_adapters_mean_nothing_to_another_process() -> None:
    _, store = rig(pool_tokens=400)
    first, second = (Sequence(tokenized("x", PROMPT).request, array("i", PROMPT), 40) for _ in range(2))
    keys = []
    for sequence, adapters in ((first, b"one"), (second, b"two")):
        store.tier.open(store.identity, adapters)
        sequence.namespace = "0/1/"
        sequence.pages = list(range(1, 11))
        store.tier.note(sequence, 10)
        keys.append({command.key for command in store.tier.commands if isinstance(command, Store)})
    assert keys[0] and keys[1] - keys[0], "the same version under another start has other keys"


@pytest.mark.parametrize("keep", [False, True])
def test_a_new_generation_keeps_the_tier_only_where_the_weights_stay(keep: bool) -> None:
    stepper, store = rig(pool_tokens=400)
    ask(stepper, store, "a", PROMPT)
    stepper.planner.forget_prefixes(keep_tier=keep)
    store.turn()
    assert bool(len(store.tier.files)) == keep == bool(store.files)
    assert (ask(stepper, store, "b", PROMPT) > 0) == keep


def test_what_runs_during_a_change_of_weights_is_not_kept() -> None:
    stepper, store = rig(pool_tokens=400)
    stepper.add(tokenized("a", PROMPT, 30))
    stepper.step()
    stepper.planner.forget_prefixes()
    serve(stepper, store)
    assert store.files == {} and store.tier.stored == 0


def test_a_closed_tier_does_nothing() -> None:
    tier = KvTier(4, sizes())
    sequence = Sequence(tokenized("x", PROMPT).request, array("i", PROMPT), 40, namespace="0//")
    tier.note(sequence, 10)
    assert not tier.awaits(sequence, 0, 9) and not tier.commands


def test_the_least_recently_used_prefix_goes_first_and_its_end_before_its_beginning() -> None:
    stepper, store = rig(pool_tokens=400, file_blocks=7)
    ask(stepper, store, "a", PROMPT)
    first = list(store.files)
    ask(stepper, store, "b", OTHER)
    assert len(store.files) == 7
    assert [key in store.files for key in first] == [True, True, False, False, False]


def test_a_prefix_longer_than_the_tier_keeps_its_beginning() -> None:
    stepper, store = rig(pool_tokens=400, file_blocks=3)
    ask(stepper, store, "a", PROMPT)
    ask(stepper, store, "b", PROMPT)
    stepper.planner.pool.clear()
    assert ask(stepper, store, "c", PROMPT) == 24
    assert store.tier.stored == 3


def test_blocks_are_left_out_while_too_many_wait_for_the_disk() -> None:
    stepper, store = rig(pool_tokens=400, most_pending=2)
    stepper.add(tokenized("a", PROMPT, 1))
    stepper.step()
    assert store.tier.pending == 2 and store.tier.skipped == 1
    serve(stepper, store)
    assert ask(stepper, store, "b", PROMPT) > 0  # in the tree; what is missing is stored now
    assert len(store.files) == 4


def test_a_request_goes_on_without_a_read_that_is_given_up() -> None:
    stepper, store = rig(pool_tokens=400)
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    store.draw = random.Random(0)
    store.draw.random = lambda: 0.99  # type: ignore[method-assign]  # no read ends
    stepper.add(tokenized("b", PROMPT, 2))
    assert stepper.step() is None
    store.turn()
    assert stepper.step() is None, "it waits"
    (number,) = store.tier.fetches
    store.tier.give_up(number)
    serve(stepper, store)
    assert stepper.updates["b"][0].sequence.cached_tokens == 0
    assert store.tier.arrived(number, 4) is None and not store.tier.fetches


def test_a_disk_that_hangs_holds_nobody_up() -> None:
    tier = KvTier(4, sizes())
    tier.open(b"i", b"")
    for start in range(MOST_FETCHES + 1):
        prompt = [start, *PROMPT[1:]]
        sequence = Sequence(tokenized("x", prompt).request, array("i", prompt), 40, namespace="0//")
        sequence.pages = list(range(1, 11))
        tier.note(sequence, 10)
        for store in [command for command in tier.commands if isinstance(command, Store)]:
            tier.written(store.key, store.serial, ok=True)
        tier.commands.clear()
        assert tier.awaits(sequence, 0, 9)
    for number in tier.fetches:
        tier.give_up(number)
    assert not tier.awaits(sequence, 0, 9)


def test_several_requests_wait_for_one_read() -> None:
    stepper, store = rig(pool_tokens=400)
    ask(stepper, store, "a", PROMPT)
    stepper.planner.pool.clear()
    for rid in "bcd":
        stepper.add(tokenized(rid, PROMPT, 2))
    stepper.step()
    assert len(store.tier.fetches) == 1
    serve(stepper, store)
    assert [stepper.updates[rid][0].sequence.cached_tokens for rid in "bcd"] == [32, 32, 32]


def test_known_files_beyond_the_bound_are_dropped() -> None:
    tier = KvTier(4, sizes(file_blocks=2))
    tier.open(b"i", b"", [b"old", b"newer", b"newest"])
    assert [command.key for command in tier.commands] == [b"old"]
    assert len(tier.files) == 2 and tier.counters()["kv_tier_file_bytes"] == 200


@pytest.mark.parametrize("is_recurrent", [False, True])
def test_the_books_are_exact_under_random_operations(is_recurrent: bool) -> None:
    """Requests, aborts, reads that fail or come late, writes that fail, changes of weights: no page is lost, no answer
    is wrong, and memory and files hold what the books say.
    """
    draw = random.Random(8)
    options = SnapshotOptions(7, 16) if is_recurrent else None
    stepper = Stepper(
        page_size=4, total_pages=40, context_length=150, chunked_prefill_size=20, max_running=4, snapshots=options
    )
    bounds = {"memory_blocks": 9, "file_blocks": 23, "most_pending": 6, "most_fetched": 3}
    store = FakeStore(stepper, sizes(state_pieces=2 if is_recurrent else 0, **bounds), draw)
    stems = [[7] * 60, [7] * 20 + [8] * 40, list(range(100, 170)), [9] * 30]
    prompts: dict[str, list[int]] = {}
    for operation in range(OPERATIONS):
        choice = draw.random()
        if choice < 0.15:
            prompt = draw.choice(stems)[: draw.randrange(1, 60)] + [
                draw.randrange(2, 9) for _ in range(draw.randrange(6))
            ]
            rid = f"r{operation}"
            try:
                stepper.add(tokenized(rid, prompt, draw.randrange(12), extra_key=draw.choice(["", "", "x"])))
                prompts[rid] = prompt
            except RequestError:
                pass
        elif choice < 0.17 and stepper.planner.live:
            stepper.abort(draw.choice(list(stepper.planner.live)))
        elif choice < 0.172:
            keep = draw.random() < 0.5
            store.identity = store.identity if keep else f"weights {operation}".encode()
            stepper.planner.forget_prefixes(free=draw.random() < 0.5, keep_tier=keep)
            store.turn()
        elif choice < 0.19 and store.tier.fetches:
            store.tier.give_up(draw.choice(list(store.tier.fetches)))
        elif choice < 0.5:
            store.turn()
        else:
            store.turn()
            stepper.step()
        store.check()
    serve(stepper, store)
    finished = [rid for rid in prompts if (end := stepper.finish(rid)) and end.reason == "length"]
    for rid in finished:
        output = stepper.output(rid)
        assert output == expected_output(prompts[rid], len(output)), rid
    counters = store.tier.counters()
    assert len(finished) > OPERATIONS / 20
    assert min(counters[f"kv_tier_{what}_tokens_total"] for what in ("restored", "evicted", "skipped", "given_up")) > 0
    assert counters["kv_tier_damaged_blocks_total"] > 0
