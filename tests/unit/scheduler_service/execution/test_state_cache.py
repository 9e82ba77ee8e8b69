"""Recurrent states: their rows, their snapshots, and a hybrid model that goes on from them."""

import dataclasses
import random
from array import array
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.messages import LogprobOptions, Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.model.state_access import StateSpec
from tests.engine import ALL_LOGPROBS, Engine, floats
from tests.model import tiny

GREEDY = SamplingParams(temperature=0.0, max_new_tokens=12, ignore_eos=True)
HYBRIDS = (
    *("lfm2", "qwen3_next", "qwen3_5", "olmo_hybrid", "kimi_linear"),
    *("bamba", "falcon_h1", "granite_hybrid", "nemotron_h"),
)
SPEC = StateSpec(layer=0, shapes=((1,),), dtypes=(torch.float32,))


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield tiny.build("lfm2", tmp_path_factory.mktemp("lfm2"))


def prompt(seed: int, length: int) -> list[int]:
    draw = random.Random(seed)
    return [draw.randrange(3, tiny.VOCAB_SIZE) for _ in range(length)]


def part(slot: int, start: int, end: int, **more: object) -> Slice:
    sequence = Sequence(Request(rid=f"r{slot}", params=GREEDY), array("i", range(end)), prompt_len=end)
    sequence.slot = slot
    return dataclasses.replace(Slice(sequence, start, end, True), **more)


def no_operations(*rows: object) -> torch.Tensor:
    raise AssertionError("there are none")


def count(cache: StateCache, *slices: Slice, decodes: int = 0) -> torch.Tensor:
    """A step of a layer that counts tokens: what it gives for each."""
    offsets = [0]
    for share in slices:
        offsets.append(offsets[-1] + share.end - share.start)
    rows = cache.places(Plan(list(slices), decodes=decodes), offsets)

    def compute(x: torch.Tensor, state: torch.Tensor) -> tuple[torch.Tensor, ...]:
        y = state.unsqueeze(1) + x.cumsum(1)
        return y, y[:, -1]

    y = cache.access(rows).scan(0, compute, torch.ones(offsets[-1], 1), no_operations)
    cache.copy(rows.copies)
    return y.flatten()


def test_slices_go_on_from_their_slots_and_snapshots() -> None:
    cache = StateCache([SPEC], slots=2, snapshots=3, device=torch.device("cpu"))
    found = count(cache, part(0, 0, 5, saves=((2, 0), (4, 1))), part(1, 0, 3, saves=((3, 2),)))
    assert found.tolist() == [1, 2, 3, 4, 5, 1, 2, 3]
    assert count(cache, part(0, 5, 6), part(1, 3, 4), decodes=2).tolist() == [6, 4]
    assert count(cache, part(0, 2, 4, restores=0), part(1, 4, 5, restores=1)).tolist() == [3, 4, 5]
    assert count(cache, part(0, 3, 5, restores=2)).tolist() == [4, 5]


def test_a_step_can_be_computed_again_from_the_state_it_began_with() -> None:
    cache = StateCache([SPEC], slots=1, snapshots=0, device=torch.device("cpu"))
    count(cache, part(0, 0, 4))
    for _ in range(3):
        assert count(cache, part(0, 4, 6)).tolist() == [5, 6]
    assert count(cache, part(0, 6, 7), decodes=1).tolist() == [7]
    with pytest.raises(RuntimeError, match="state of the request at position 9 is lost"):
        count(cache, part(0, 9, 10), decodes=1)


def test_memory_is_what_the_books_say(directory: Path) -> None:
    worker = Engine(directory, max_running_requests=3).worker
    cache = worker.state_cache
    assert cache is not None and worker.max_running_requests == cache.slots == 3
    assert cache.nbytes == sum(pool.nbytes for pools in cache.pools.values() for pool in pools)
    one = 2 * 2 * 64 * 4  # layers, tokens, channels, bytes
    assert cache.nbytes == one * (1 + 2 * 3 + cache.snapshots)
    assert worker.facts().memory_usage["state"] == round(cache.nbytes / (1 << 30), 2)
    cache.release()
    assert cache.pools == {}
    cache.allocate()


def test_prefix_hits_inside_the_prompt_and_after_a_branch_change_no_answer(directory: Path) -> None:
    stem = prompt(1, 60)
    prompts = [[*stem, *prompt(seed, 10 + seed)] for seed in (2, 3, 4)]
    cached = Engine(directory)
    found = [cached.generate([ids], GREEDY)[0] for ids in prompts]
    alone = Engine(directory, disable_radix_cache=True)
    assert [answer.ids for answer in found] == [alone.generate([ids], GREEDY)[0].ids for ids in prompts]
    assert [answer.cached_tokens for answer in found] == [0, 0, 60]
    again = cached.generate(prompts, GREEDY)
    assert [answer.ids for answer in again] == [answer.ids for answer in found]
    assert [answer.cached_tokens for answer in again] == [68, 72, 72]


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "nemotron_h"])
def test_deterministic_answers_have_the_same_bits_alone_in_a_batch_and_cached(family: str, tmp_path: Path) -> None:
    directory = tiny.build(family, tmp_path)
    settings = {"enable_deterministic_inference": True, "dtype": "bfloat16"}
    prompts = [prompt(seed, 5 + 9 * seed) for seed in range(6)]
    alone = [
        Engine(directory, **settings).generate([ids], GREEDY, logprobs=ALL_LOGPROBS)[0].logprobs for ids in prompts
    ]
    engine = Engine(directory, chunked_prefill_size=16, **settings)
    together = engine.generate(prompts, GREEDY, logprobs=ALL_LOGPROBS)
    again = engine.generate(prompts, GREEDY, logprobs=LogprobOptions(start=-1))
    assert max(answer.cached_tokens for answer in again) > 40
    assert [answer.logprobs for answer in together] == alone == [answer.logprobs for answer in again]


@pytest.mark.parametrize("family", ["qwen3_5", "falcon_h1", "lfm2"])
def test_many_streams_in_a_small_pool_with_few_states_all_give_their_own_tokens(family: str, tmp_path: Path) -> None:
    directory = tiny.build(family, tmp_path)
    settings = {"enable_deterministic_inference": True, "dtype": "bfloat16"}
    stem = prompt(1, 30)
    prompts = [[*stem[: 6 * (seed % 6)], *prompt(seed, 3 + 2 * seed)] for seed in range(24)]
    params = SamplingParams(temperature=0.0, max_new_tokens=36, ignore_eos=True)
    roomy = Engine(directory, max_running_requests=24, **settings)
    expected = roomy.generate(prompts, params)
    pressed = Engine(directory, max_running_requests=6, max_total_tokens=200, chunked_prefill_size=24, **settings)
    cache = pressed.worker.state_cache
    assert cache is not None and cache.slots == 6 and pressed.worker.page_count == 50
    found = pressed.generate(prompts, params)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]
    assert sum(answer.retractions for answer in found) > 0
    assert sum(answer.cached_tokens for answer in found) > 0
    assert pressed.planner.audit() == ""


@pytest.mark.parametrize("family", HYBRIDS)
def test_kernels_answer_as_torch_does(family: str, tmp_path: Path) -> None:
    directory = tiny.build(family, tmp_path)
    prompts = [prompt(seed, 4 + 11 * seed) for seed in range(5)]
    by_kernels, by_torch = (Engine(directory, chunked_prefill_size=32) for _ in range(2))
    cache, other_cache = by_kernels.worker.state_cache, by_torch.worker.state_cache
    assert cache is not None and other_cache is not None
    if cache.kernels is None:
        pytest.skip("no kernels on this machine")
    other_cache.kernels = None
    found, expected = (engine.generate(prompts, GREEDY, logprobs=ALL_LOGPROBS) for engine in (by_kernels, by_torch))
    for own, other in zip(found, expected, strict=True):
        assert own.ids == other.ids
        for left, right in ((own.logprobs, other.logprobs), (own.input_logprobs, other.input_logprobs)):
            assert left is not None and right is not None
            values = (torch.tensor(floats(each.values)[1:]) for each in (left, right))
            torch.testing.assert_close(*values, rtol=0, atol=1e-4)


def test_drafts_are_refused_where_layers_are_recurrent(directory: Path) -> None:
    with pytest.raises(StartupError, match="recurrent layers cannot take back"):
        Engine(directory, speculative_algorithm="NGRAM")


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5"])
def test_exchanged_weights_serve_and_no_prefix_of_the_old_ones_is_found(family: str, tmp_path: Path) -> None:
    served = Engine(tiny.build(family, tmp_path / "old"))
    new = Engine(tiny.build(family, tmp_path / "new", seed=1))
    ids = prompt(1, 40)
    (old,), (expected,) = served.generate([ids], GREEDY), new.generate([ids], GREEDY)
    weights, staged = served.worker.model.weights, new.worker.model.weights
    weights.take_over(staged, list(weights.names()), weights.pack(staged))
    served.planner.forget_prefixes()
    (found,) = served.generate([ids], GREEDY)
    assert found.ids == expected.ids != old.ids
    assert found.cached_tokens == 0
