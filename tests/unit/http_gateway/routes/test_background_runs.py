"""Work that outlasts the call that began it."""

import asyncio

import pytest

from quartet.http_gateway.routes.background_runs import BackgroundRun, BackgroundRuns
from quartet.runtime.errors import Kind, RequestError
from tests.unit.http_gateway.harness import asynchronous


def started(runs: BackgroundRuns, lasts_s: float, found: list[BaseException | None]) -> BackgroundRun:
    """A run named "a", whose end puts its error into `found`."""

    async def at_end(error: BaseException | None) -> None:
        found.append(error)

    run = BackgroundRun(lambda: "state", asyncio.sleep(lasts_s), at_end)
    runs.add("a", run)
    return run


@asynchronous
async def test_a_run_is_kept_until_what_follows_it_is_done() -> None:
    runs, found = BackgroundRuns(), list[BaseException | None]()
    run = started(runs, 0, found)
    assert runs.get("a") is run and run.describe() == "state"
    await runs.finish(10)
    assert found == [None]
    await asyncio.sleep(0)
    assert runs.get("a") is None


@asynchronous
async def test_a_cancelled_run_ends_once() -> None:
    runs, found = BackgroundRuns(), list[BaseException | None]()
    run = started(runs, 100, found)
    await asyncio.sleep(0)
    await run.cancel()
    await run.cancel()
    [error] = found
    assert isinstance(error, asyncio.CancelledError)


@asynchronous
async def test_runs_that_take_too_long_are_not_waited_for() -> None:
    runs, found = BackgroundRuns(), list[BaseException | None]()
    run = started(runs, 100, found)
    await runs.finish(0)
    assert not found
    await run.cancel()


@pytest.mark.parametrize("bounds", [{"most_runs": 1}, {"most_bytes": 9}])
@asynchronous
async def test_a_run_without_a_place_is_refused_until_another_has_ended(bounds: dict[str, int]) -> None:
    runs = BackgroundRuns(**bounds)
    runs.reserve("a", 5)
    with pytest.raises(RequestError) as refused:
        runs.reserve("b", 5)
    assert (refused.value.kind, refused.value.field) == (Kind.UNAVAILABLE, "background")
    started(runs, 0, [])
    await runs.finish(10)
    await asyncio.sleep(0)
    runs.reserve("b", 10)  # alone, it has a place
    runs.release("b")
    runs.reserve("c", 5)
