"""The counters of several schedulers, of which one may hang."""

import asyncio

from quartet.http_gateway.ring.counter_cache import CounterCache
from quartet.runtime.control import Probe
from tests.unit.http_gateway.harness import asynchronous
from tests.unit.http_gateway.ring.test_several_schedulers import Fleet, fleet, settle

FOR_EVER = 1000.0  # seconds: a test that waits so long has failed


async def answer(ring: Fleet, *ranks: int) -> None:
    """Have these schedulers answer the last probe that each got, with a number that tells them apart."""
    await settle()
    for rank in ranks:
        probe = [probe for probe in ring.sent(Probe) if probe.rank == rank][-1]
        probe.counters = {"tokenizer": {"requests": 10 + rank}, "scheduler": {"num_running_reqs": 1 + rank}}
        await ring.say(probe)


@asynchronous
async def test_each_scheduler_is_told_apart_and_all_are_added_up() -> None:
    async with fleet() as ring:
        cache = CounterCache(ring.client)
        reading = asyncio.create_task(cache.read(0, FOR_EVER))
        await answer(ring, 1, 0)
        counters = await reading
        assert counters["scheduler"] == {"num_running_reqs": 3}
        assert (counters["scheduler DP0"], counters["scheduler DP1"]) == (
            {"num_running_reqs": 1},
            {"num_running_reqs": 2},
        )
        assert counters["tokenizer"] == {"requests": 10}, "of the last answer"
        assert [title for title in counters if title.startswith("scheduler")] == [
            "scheduler",
            "scheduler DP0",
            "scheduler DP1",
        ]
        assert cache.unanswered() == []


@asynchronous
async def test_one_that_hangs_is_named_and_not_waited_for_again() -> None:
    async with fleet() as ring:
        cache = CounterCache(ring.client)
        reading = asyncio.create_task(cache.read(0, 0.01))
        await answer(ring, 0)
        await reading
        assert cache.unanswered() == [1]
        reading = asyncio.create_task(cache.read(0, FOR_EVER))
        await answer(ring, 0)
        assert (await reading)["scheduler DP0"] == {"num_running_reqs": 1}
        assert "scheduler DP1" not in cache.last
        assert len([probe for probe in ring.sent(Probe) if probe.rank == 1]) == 1, "the first is still on its way"
        await answer(ring, 1)
        assert cache.unanswered() == []
        assert (await cache.read(FOR_EVER))["scheduler"] == {"num_running_reqs": 3}


@asynchronous
async def test_what_one_said_before_it_hung_stands_for_it() -> None:
    async with fleet() as ring:
        cache = CounterCache(ring.client)
        reading = asyncio.create_task(cache.read(0, FOR_EVER))
        await answer(ring, 0, 1)
        await reading
        await cache.read(0, 0.01)
        assert cache.unanswered() == [0, 1]
        assert cache.last["scheduler"] == {"num_running_reqs": 3}
        assert cache.unanswered(older_than_s=FOR_EVER) == []


@asynchronous
async def test_a_probe_that_another_scheduler_answers_says_nothing_of_the_dead_one() -> None:
    async with fleet() as ring:
        cache = CounterCache(ring.client)
        reading = asyncio.create_task(cache.read(0, FOR_EVER))
        await answer(ring, 0)
        await ring.end(1)
        await answer(ring, 0)
        counters = await reading
        assert counters["scheduler"] == {"num_running_reqs": 1}
        assert "scheduler DP1" not in counters and cache.unanswered() == []
