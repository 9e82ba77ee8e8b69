"""Models with recurrent layers, computed by two ranks: transformers' numbers, snapshots, updates, memory, the tier."""

from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.rank_memory import LeadingSaver
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import LeadingSteps
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights.inspection import Inspection
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.model import parity, tiny
from tests.ranks import Served, run_ranks, serve_cases, serving
from tests.tiered import BLOCK, OUTPUT_LOGPROBS, PARAMS, PROMPTS, SIZES, Tiered

# directory → family, and what its config has besides
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_next": ("qwen3_next", {}),
    "qwen3_5": ("qwen3_5", {}),
    "qwen3_5 with one head of keys": ("qwen3_5", {"linear_num_key_heads": 1}),
    "granite_hybrid": ("granite_hybrid", {}),
    "granite_hybrid with one group": ("granite_hybrid", {"mamba_n_groups": 1}),
    "granite_hybrid without experts": ("granite_hybrid", {"mamba_n_groups": 1, "num_local_experts": 0}),
    "nemotron_h": ("nemotron_h", {}),
    "falcon_h1": ("falcon_h1", {}),
    "falcon_h1 with one normed group": ("falcon_h1", {"mamba_n_groups": 1, "mamba_rms_norm": True}),
    "bamba": ("bamba", {"mamba_n_groups": 1}),
    "lfm2": ("lfm2", {}),
    "olmo_hybrid": ("olmo_hybrid", {"num_key_value_heads": 1}),
    "kimi_linear": ("kimi_linear", {}),
}
ALL = list(parity.CASES)
CASES = {  # of the parity table
    "qwen3_next": ["prefix hits"],
    "qwen3_5": ALL,
    "qwen3_5 with one head of keys": ["chunks of 16"],
    "granite_hybrid": ["retraction"],
    "granite_hybrid with one group": ALL,
    "granite_hybrid without experts": ["16 at once"],
    "nemotron_h": ["chunks of 16"],
    "falcon_h1": ["prefix hits"],
    "falcon_h1 with one normed group": ["one request"],
    "bamba": ["16 at once"],
    "lfm2": ALL,
    "olmo_hybrid": ["chunks of 16"],
    "kimi_linear": ["prefix hits"],
}
ONE_OF_EACH_KIND = ["qwen3_5", "granite_hybrid with one group", "lfm2"]
DTYPES = ["float32", "bfloat16"]
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=6, ignore_eos=True)
BEGINNING = [(7 * i) % 290 + 4 for i in range(24)]
TEXTS = [BEGINNING[:3], *([*BEGINNING, 9, 8, i] for i in range(4, 10)), [7, 8, 9, 10] * 8]


# What the ranks compute


def all_of_it(parallel: Parallel, models: Path, place: Path) -> dict[str, Any]:
    """Rank 0 has what came of it."""
    found: dict[str, Any] = {"parity": serve_cases(parallel, models, CASES, parity.FEW_TOKENS)}
    for name in ONE_OF_EACH_KIND:
        found |= {("bits", name, dtype): bits(parallel, models / name, dtype) for dtype in DTYPES}
        found["update", name] = update(parallel, models, name)
        found["memory", name] = memory(parallel, models / name)
        found["tier", name] = come_back(parallel, models / name, {"kv_cache_dir": str(place / f"tier {name}")})
    return found


def bits(parallel: Parallel, model: Path, dtype: str) -> tuple[list[Any], list[Any]]:
    """Each prompt alone; all at once, in chunks, with what the prefix cache has."""
    alone: list[Any] = []
    together: list[Any] = []
    settings = {"dtype": dtype, "enable_deterministic_inference": True}
    with serving(parallel, model, disable_radix_cache=True, **settings) as engine:
        for text in TEXTS if engine else ():
            assert engine is not None
            alone += engine.generate([text], GREEDY, logprobs=ALL_LOGPROBS)
    with serving(parallel, model, chunked_prefill_size=11, **settings) as engine:
        if engine is not None:
            together = engine.generate(TEXTS, GREEDY, logprobs=ALL_LOGPROBS)
    return [bits_of(answer) for answer in alone], [bits_of(answer) for answer in together]


def bits_of(answer: Answer) -> tuple[Any, ...]:
    assert answer.logprobs and answer.input_logprobs
    return answer.ids, answer.logprobs.values, answer.input_logprobs.values


def updates_of(engine: Engine, model: Path) -> LeadingUpdates:
    steps = engine.worker.steps
    assert isinstance(steps, LeadingSteps)
    return LeadingUpdates(engine.worker.model.weights, engine.config, str(model), lambda _: None, steps.followers)


def update(parallel: Parallel, models: Path, name: str) -> tuple[list[Answer], dict[str, str]]:
    """What other weights answer after a swap, and their checksums."""
    with serving(parallel, models / name) as engine:
        if engine is None:
            return [], {}
        engine.generate(TEXTS, GREEDY)
        updates = updates_of(engine, models / name)
        updates.swap(updates.from_disk(str(models / f"other {name}"), "auto", None), "2")
        engine.planner.forget_prefixes()
        answers = engine.generate(TEXTS, GREEDY, logprobs=LogprobOptions(start=-1))
        return answers, updates.inspection.checksums(updates.inspection.names(None))[0]


def memory(parallel: Parallel, model: Path) -> list[list[Answer]]:
    """Answers before memory is given back, and after it was taken again."""
    with serving(parallel, model) as engine:
        if engine is None:
            return []
        steps = engine.worker.steps
        assert isinstance(steps, LeadingSteps)
        worker, updates = engine.worker, updates_of(engine, model)
        saver = LeadingSaver(updates, worker.cache, True, steps.followers, worker.state_cache)
        before = engine.generate(TEXTS, GREEDY, logprobs=OUTPUT_LOGPROBS)
        saver.release(None)
        assert worker.state_cache is not None and not worker.state_cache.pools
        engine.planner.forget_prefixes()
        saver.resume(None)
        return [before, engine.generate(TEXTS, GREEDY, logprobs=OUTPUT_LOGPROBS)]


def come_back(parallel: Parallel, model: Path, settings: dict[str, Any]) -> list[tuple[int, Answer]]:
    """Blocks found at the start, and an answer: computed; after its prefix has left the pool; after a restart."""
    found: list[tuple[int, Answer]] = []
    for asked in ([0, 1, 0], [0]):
        with serving(parallel, model, **SIZES, **settings) as engine:
            if engine is None:
                continue
            steps = engine.worker.steps
            assert isinstance(steps, LeadingSteps)
            served = Tiered(engine, updates_of(engine, model), steps.followers)
            known = len(served.tier.files)
            for number in asked:
                answer = served.ask(number)
                served.settle()
                if number == 0:
                    found.append((known, answer))
    return found


# The same of one process, and of transformers


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models")
    for name, (family, overrides) in MODELS.items():
        tiny.build(family, directory / name, **overrides)
    for name in ONE_OF_EACH_KIND:
        family, overrides = MODELS[name]
        tiny.build(family, directory / f"other {name}", seed=1, **overrides)
    return directory


@pytest.fixture(scope="module")
def of_two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[Any, Any]:
    place = tmp_path_factory.mktemp("ranks")
    found: dict[Any, Any] = run_ranks(2, place, all_of_it, models, place)[0]
    return found


def same(found: list[Answer], expected: list[Answer], error: float = 1e-4) -> None:
    for own, other in zip(found, expected, strict=True):
        assert own.logprobs is not None and other.logprobs is not None
        assert own.ids == other.ids
        assert floats(own.logprobs.values) == pytest.approx(floats(other.logprobs.values), abs=error)


@pytest.mark.parametrize(("name", "case"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_two_ranks_agree_with_transformers(name: str, case: str, models: Path, of_two_ranks: dict[Any, Any]) -> None:
    served: Served = of_two_ranks["parity"][name, case]
    found = parity.compare(parity.Peer(models / name), *served, parity.FEW_TOKENS)
    assert found.tokens_equal and found.error <= parity.TOLERANCE, found
    assert (case == "prefix hits") <= (found.cached_tokens > 0)
    assert (case == "retraction") <= (found.retractions > 0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_deterministic_answers_have_the_same_bits_in_any_batch(
    name: str, dtype: str, of_two_ranks: dict[Any, Any]
) -> None:
    alone, together = of_two_ranks["bits", name, dtype]
    assert len(alone) == len(TEXTS) and together == alone


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_an_update_reaches_both_ranks(name: str, models: Path, of_two_ranks: dict[Any, Any]) -> None:
    answers, checksums = of_two_ranks["update", name]
    alone = Engine(models / f"other {name}")
    same(answers, alone.generate(TEXTS, GREEDY, logprobs=OUTPUT_LOGPROBS))
    inspection = Inspection(alone.worker.model.weights)
    assert checksums == inspection.checksums(inspection.names(None))[0]


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_memory_of_states_is_given_back_and_taken_again(name: str, of_two_ranks: dict[Any, Any]) -> None:
    before, after = of_two_ranks["memory", name]
    same(after, before)


@pytest.mark.parametrize("name", ONE_OF_EACH_KIND)
def test_snapshots_come_back_from_files_on_both_ranks(name: str, models: Path, of_two_ranks: dict[Any, Any]) -> None:
    found = of_two_ranks["tier", name]
    assert [answer.cached_tokens for _, answer in found] == [0, 3 * BLOCK, 3 * BLOCK]
    assert [bool(known) for known, _ in found] == [False, False, True]
    alone = Engine(models / name, page_size=4).generate([PROMPTS[0]], PARAMS, logprobs=OUTPUT_LOGPROBS)
    same([answer for _, answer in found], alone * 3)
