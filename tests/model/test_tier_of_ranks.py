"""KV beyond the pool of a model that two ranks compute: it comes back on both, with the same bits, or not at all."""

from pathlib import Path
from typing import Any

import pytest

from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import LeadingSteps
from quartet.scheduler_service.host.parallel import Parallel
from tests import checkpoints
from tests.engine import Answer, Engine, floats
from tests.ranks import run_ranks, serving
from tests.tiered import BLOCK, OUTPUT_LOGPROBS, PARAMS, PROMPTS, SIZES, Tiered

MEMORY = {"enable_hierarchical_cache": True, "hicache_ratio": 8.0}
LEVELS = ["files", "memory", "both"]
DETERMINISTIC = [False, True]


# What the ranks compute


def levels(place: Path) -> dict[str, dict[str, Any]]:
    files = {"kv_cache_dir": str(place)}
    return {"files": files, "memory": MEMORY, "both": files | MEMORY}


def all_of_it(parallel: Parallel, models: Path, place: Path) -> dict[str, Any]:
    """Rank 0 has the answers."""
    found: dict[str, Any] = {}
    for level in LEVELS:
        for deterministic in DETERMINISTIC:
            settings = levels(place / f"{level} {deterministic}")[level]
            settings |= {"enable_deterministic_inference": deterministic}
            found[f"{level} {deterministic}"] = come_back(parallel, models / "a", settings)
    kept = {"kv_cache_dir": str(place / "kept")}
    found["restarts"] = restarts(parallel, models / "a", kept)
    found["update"] = update(parallel, models, {"kv_cache_dir": str(place / "update")})
    return found


def tiered(engine: Engine, model: Path) -> Tiered:
    steps = engine.worker.steps
    assert isinstance(steps, LeadingSteps)
    weights = engine.worker.model.weights
    return Tiered(
        engine, LeadingUpdates(weights, engine.config, str(model), lambda _: None, steps.followers), steps.followers
    )


def come_back(parallel: Parallel, model: Path, settings: dict[str, Any]) -> list[Answer]:
    """An answer computed, and the same one after its prefix has left the pool."""
    with serving(parallel, model, **SIZES, **settings) as engine:
        if engine is None:
            return []
        served = tiered(engine, model)
        first = served.ask(0)
        served.settle()
        served.ask(1)
        return [first, served.ask(0)]


def restarts(parallel: Parallel, model: Path, settings: dict[str, Any]) -> dict[str, tuple[int, Answer]]:
    """Blocks that are found at a start, and the answer then: after a fill, damage to rank 1's files, and a loss."""
    found: dict[str, tuple[int, Answer]] = {}
    for name, harm in {"filled": nothing, "again": nothing, "damaged": damage, "gone": lose}.items():
        with serving(parallel, model, **SIZES, **settings) as engine:
            if engine is not None:
                harm(Path(settings["kv_cache_dir"]) / "rank1")
                served = tiered(engine, model)
                known = len(served.tier.files)
                found[name] = known, served.ask(0)
                served.settle()
                served.store.turn(0.0)
    return found


def nothing(directory: Path) -> None:
    """All is well."""


def files_of(directory: Path) -> list[Path]:
    return sorted(directory.glob("*/*.kv"), key=lambda path: path.stat().st_mtime_ns)


def damage(directory: Path) -> None:
    for file in files_of(directory)[:1]:
        data = bytearray(file.read_bytes())
        data[-1] ^= 1
        file.write_bytes(data)


def lose(directory: Path) -> None:
    files_of(directory)[0].unlink()


def update(parallel: Parallel, models: Path, settings: dict[str, Any]) -> list[tuple[int, Answer]]:
    """How many files rank 1 has, and the answer: before an update of the weights, behind it, and from the tier."""
    found: list[tuple[int, Answer]] = []
    with serving(parallel, models / "a", **SIZES, **settings) as engine:
        if engine is None:
            return found
        served, directory = tiered(engine, models / "a"), Path(settings["kv_cache_dir"]) / "rank1"

        def ask() -> None:
            answer = served.ask(0)
            served.settle()
            found.append((len(files_of(directory)), answer))

        ask()
        served.updates.swap(served.updates.from_disk(str(models / "b"), "auto", None), "2")
        engine.planner.forget_prefixes()
        ask()
        engine.planner.pool.clear()
        ask()
    return found


# The same of one process


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("models")
    for seed, name in enumerate("ab", 5):
        checkpoints.random_model(place / name, seed)
    return place


@pytest.fixture(scope="module")
def of_two_ranks(models: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    place = tmp_path_factory.mktemp("ranks")
    found: dict[str, Any] = run_ranks(2, place, all_of_it, models, place)[0]
    return found


@pytest.fixture(scope="module")
def computed(models: Path) -> dict[str, Answer]:
    """Answers of one process, by model."""
    return {
        name: Engine(models / name, page_size=4).generate([PROMPTS[0]], PARAMS, logprobs=OUTPUT_LOGPROBS)[0]
        for name in "ab"
    }


def same(found: Answer, expected: Answer) -> None:
    assert found.logprobs is not None and expected.logprobs is not None
    assert found.ids == expected.ids
    assert floats(found.logprobs.values) == pytest.approx(floats(expected.logprobs.values), abs=1e-5)


@pytest.mark.parametrize("deterministic", DETERMINISTIC)
@pytest.mark.parametrize("level", LEVELS)
def test_kv_comes_back_on_both_ranks(
    level: str, deterministic: bool, of_two_ranks: dict[str, Any], computed: dict[str, Answer]
) -> None:
    first, again = of_two_ranks[f"{level} {deterministic}"]
    assert first.cached_tokens == 0 and again.cached_tokens == 3 * BLOCK
    same(first, computed["a"])
    same(again, computed["a"])
    if deterministic:
        assert first.logprobs.values == again.logprobs.values, "bit for bit"


def test_a_restart_finds_what_both_ranks_have(of_two_ranks: dict[str, Any], computed: dict[str, Answer]) -> None:
    found = of_two_ranks["restarts"]
    assert {name: known for name, (known, _) in found.items()} == {"filled": 0, "again": 3, "damaged": 3, "gone": 2}
    cached = [answer.cached_tokens for _, answer in found.values()]
    assert cached[:2] == [0, 3 * BLOCK]
    assert all(number < 3 * BLOCK for number in cached[2:]), (
        "a block of which one rank lacks its part is computed again"
    )
    for _, answer in found.values():
        same(answer, computed["a"])


def test_an_update_of_the_weights_drops_all_on_both_ranks(
    of_two_ranks: dict[str, Any], computed: dict[str, Answer]
) -> None:
    found = of_two_ranks["update"]
    assert [(files, answer.cached_tokens) for files, answer in found] == [(3, 0), (3, 0), (3, 3 * BLOCK)]
    for (_, answer), name in zip(found, "abb", strict=True):
        same(answer, computed[name])
