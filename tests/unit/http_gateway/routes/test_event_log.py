"""Events that are kept for a while, in a bound that all logs share."""

import asyncio

import pytest

from quartet.http_gateway.http.sse import Event
from quartet.http_gateway.routes.event_log import EventLog, EventLogs
from quartet.runtime.errors import RequestError
from tests.unit.http_gateway.harness import asynchronous

ONE = Event(b"1")
SIZE = len(b"data: 1\n\n")


async def read(log: EventLog, start: int = 0) -> bytes:
    return b"".join([part async for part in log.read(start, asyncio.Event())])


@asynchronous
async def test_a_reader_gets_what_is_there_and_what_comes_later() -> None:
    logs = EventLogs()
    log = logs.open("a")
    logs.add(log, [Event(b"1"), Event(b"2")])
    reading = asyncio.create_task(read(log, 1))
    await asyncio.sleep(0)
    logs.add(log, [Event(b"3")])
    logs.end("a")
    assert await reading == b"data: 2\n\ndata: 3\n\n"
    assert await read(log, 2) == b"data: 3\n\n" and await read(log, 9) == b""


@asynchronous
async def test_a_reader_that_has_left_reads_no_more() -> None:
    log, left = EventLog(), asyncio.Event()
    reading = asyncio.create_task(anext(log.read(0, left), b"end"))
    await asyncio.sleep(0)
    left.set()
    log.wake()
    assert await reading == b"end"


@asynchronous
async def test_logs_that_have_ended_make_room_first() -> None:
    logs = EventLogs(most_bytes=2 * SIZE)
    for name in ("a", "b", "c"):
        log = logs.open(name)
        logs.add(log, [ONE])
        if name != "c":
            logs.end(name)
    assert logs.get("a") is None
    assert logs.get("b") is not None and logs.get("c") is not None


@asynchronous
async def test_a_log_that_alone_is_too_large_loses_its_events() -> None:
    logs = EventLogs(most_bytes=2 * SIZE)
    log = logs.open("a")
    reading = asyncio.create_task(read(log))
    logs.add(log, [ONE, ONE, ONE])
    logs.add(log, [ONE])
    with pytest.raises(RequestError, match="no longer kept"):
        await reading
    logs.end("a")
    assert logs.get("a") is None
    logs.add(logs.open("b"), [ONE, ONE])
    assert logs.get("b") is not None


@asynchronous
async def test_a_log_is_kept_for_a_while_after_its_end() -> None:
    now = 0.0
    logs = EventLogs(most_age_s=10, now=lambda: now)
    for name in ("a", "b"):
        logs.add(logs.open(name), [ONE])
    logs.end("a")
    now = 11.0
    assert logs.get("a") is None and logs.get("b") is not None


@asynchronous
async def test_who_began_a_run_gets_all_events_though_none_are_kept() -> None:
    logs = EventLogs(most_bytes=SIZE)
    log = logs.open("a")
    logs.add(log, [Event(b"1"), Event(b"2")])
    assert logs.get("a") is None
    reading = asyncio.create_task(read_as_first(log))
    await asyncio.sleep(0)
    logs.add(log, [Event(b"3")])
    logs.end("a")
    assert await reading == b"data: 1\n\ndata: 2\n\ndata: 3\n\n"
    assert await read_as_first(log) == b""


@asynchronous
async def test_of_logs_that_grow_the_largest_one_makes_room() -> None:
    logs = EventLogs(most_bytes=3 * SIZE)
    logs.add(logs.open("large"), [ONE, ONE])
    small = logs.open("small")
    logs.add(small, [ONE])
    logs.add(small, [ONE])
    assert logs.get("large") is None and await first_part(small) == 2 * b"data: 1\n\n"


async def first_part(log: EventLog) -> bytes:
    return await anext(log.read(0, asyncio.Event()))


async def read_as_first(log: EventLog) -> bytes:
    return b"".join([part async for part in log.read_as_first(asyncio.Event())])
