"""Bounds on the head of a request, at the level of bytes."""

import asyncio
import contextlib
import socket
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from quartet.http_gateway.http.connection_limit import MONITORING_PLACES, SPARE_DESCRIPTORS, ConnectionLimit
from quartet.http_gateway.http.protocol import LAST_CHANCE_S, MOST_PIPELINED, PIECE_BYTES, BoundedProtocol
from quartet.runtime.limits import (
    BODY_GRACE_S,
    HEADER_DEADLINE_S,
    LEAST_BODY_RATE,
    MAX_HEADER_BYTES,
    READ_STALL_S,
)
from tests.unit.http_gateway.harness import asynchronous

KEEP_ALIVE_S = 75


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = self.aborted = self.paused = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def abort(self) -> None:
        self.closed = self.aborted = True

    def pause_reading(self) -> None:
        self.paused = True

    def resume_reading(self) -> None:
        self.paused = False

    def is_closing(self) -> bool:
        return self.closed


class Timers:
    """The loop that the protocol sees: its timers are fired by the test."""

    def __init__(self) -> None:
        self.armed: list[tuple[float, Any, tuple[Any, ...]]] = []
        self.now = 0.0

    def time(self) -> float:
        return self.now

    def call_later(self, delay: float, callback: Any, *arguments: Any) -> Any:
        entry = (delay, callback, arguments)
        self.armed.append(entry)
        timers = self

        class Handle:
            def cancel(self) -> None:
                if entry in timers.armed:
                    timers.armed.remove(entry)

        return Handle()

    def create_task(self, coroutine: Any) -> Any:
        return asyncio.get_running_loop().create_task(coroutine)

    def fire(self) -> None:
        """The time of the one that is armed has come."""
        [entry] = self.armed
        self.armed.remove(entry)
        delay, callback, arguments = entry
        self.now += delay
        callback(*arguments)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def connected(app: Any = app) -> tuple[BoundedProtocol, FakeTransport, Timers]:
    timers, transport = Timers(), FakeTransport()
    config = uvicorn.Config(app, log_config=None, lifespan="off", timeout_keep_alive=KEEP_ALIVE_S)
    config.load()
    protocol = BoundedProtocol(config=config, server_state=ServerState(), app_state={}, _loop=timers)  # type: ignore[arg-type]
    protocol.connection_made(transport)
    return protocol, transport, timers


@asynchronous
async def test_a_head_without_end_is_cut_off() -> None:
    protocol, transport, _ = connected()
    protocol.data_received(b"GET / HTTP/1.1\r\nX: ")
    for _ in range(MAX_HEADER_BYTES // 1000 + 1):
        protocol.data_received(b"x" * 1000)
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    assert transport.closed


CHUNKED = b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n"


@pytest.mark.parametrize("framing", [b"0\r\nX: ", b"1\r\na\r\n0\r\nX: ", b"5;"])
@asynchronous
async def test_what_frames_a_body_is_bounded_like_a_head(framing: bytes) -> None:
    protocol, transport, _ = connected(never_answers)
    protocol.data_received(CHUNKED + framing)
    for _ in range(MAX_HEADER_BYTES // 1000 - 1):
        protocol.data_received(b"x" * 1000)
    assert not transport.closed
    protocol.data_received(b"x" * (10 * PIECE_BYTES))
    assert transport.written.startswith(b"HTTP/1.1 431 ")
    assert transport.closed


@asynchronous
async def test_many_lines_of_a_trailer_are_bounded_too() -> None:
    protocol, transport, _ = connected(never_answers)
    protocol.data_received(CHUNKED + b"0\r\n" + b"X: y\r\n" * (1 << 20))
    assert transport.closed
    assert len(protocol.headers) < 2 * MAX_HEADER_BYTES // len(b"X: y\r\n")


@asynchronous
async def test_a_body_of_many_small_chunks_is_no_frame_without_a_body() -> None:
    protocol, transport, _ = connected(never_answers)
    protocol.data_received(CHUNKED + b"1;x=y\r\na\r\n" * (4 * MAX_HEADER_BYTES) + b"0\r\n\r\n")
    assert not transport.closed and not transport.written


@pytest.mark.parametrize(("first", "seconds"), [(b"", KEEP_ALIVE_S), (b"GET / HTT", HEADER_DEADLINE_S)])
@asynchronous
async def test_half_open_requests_are_not_held_for_ever(first: bytes, seconds: float) -> None:
    protocol, transport, timers = connected()
    if first:
        protocol.data_received(first)
    assert [delay for delay, _, _ in timers.armed] == [seconds]
    timers.fire()
    assert transport.written.startswith(b"HTTP/1.1 408 ")
    assert transport.closed


def posted(length: int) -> bytes:
    return b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % length


async def answered(protocol: BoundedProtocol) -> None:
    while protocol.tasks:
        await asyncio.sleep(0)


@asynchronous
async def test_a_long_body_is_no_head() -> None:
    protocol, transport, timers = connected()
    protocol.data_received(posted(40_000))
    protocol.data_received(b"x" * 39_999)
    assert not transport.closed
    await answered(protocol)
    assert transport.written.startswith(b"HTTP/1.1 200 ")
    protocol.data_received(b"x")
    assert {delay for delay, _, _ in timers.armed} == {KEEP_ALIVE_S}


@pytest.mark.parametrize(
    ("target", "hosts", "seen"),
    [
        (b"/", [b"a"], [b"a"]),
        (b"http://b:1/path", [b"a"], [b"b:1"]),
        (b"HTTP://b?x", [b"a"], [b"b"]),
        (b"http://b/", [], [b"b"]),
        (b"http://b/", [b"a", b"b"], [b"a", b"b"]),  # refused, whatever the target says
        (b"/http://b/", [b"a"], [b"a"]),
    ],
)
@asynchronous
async def test_a_target_in_absolute_form_names_the_host(target: bytes, hosts: list[bytes], seen: list[bytes]) -> None:
    protocol, _, _ = connected()
    lines = [b"GET " + target + b" HTTP/1.1", *(b"Host: " + host for host in hosts)]
    protocol.data_received(b"\r\n".join([*lines, b"", b""]))
    assert [value for name, value in protocol.scope["headers"] if name == b"host"] == seen
    while protocol.tasks:
        await asyncio.sleep(0)


async def reads_all(scope: Any, receive: Any, send: Any) -> None:
    while (await receive()).get("more_body"):
        pass
    await app(scope, receive, send)


@pytest.mark.parametrize("chunked", [False, True])
@asynchronous
async def test_half_a_body_is_not_waited_for_for_ever(chunked: bool) -> None:
    protocol, transport, timers = connected(reads_all)
    chunks = b"POST / HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nxx\r\n"
    protocol.data_received(chunks if chunked else posted(100) + b"xx")
    assert [delay for delay, _, _ in timers.armed] == [BODY_GRACE_S]
    for _ in range(3):
        if not transport.closed:
            timers.fire()
    assert transport.written.startswith(b"HTTP/1.1 408 ") and transport.closed
    assert timers.now < BODY_GRACE_S + 2 * LAST_CHANCE_S


@asynchronous
async def test_a_body_that_comes_slowly_has_time_as_long_as_it_comes_at_the_least_rate() -> None:
    protocol, transport, timers = connected(reads_all)
    protocol.data_received(posted(10**6))
    for _ in range(50):
        protocol.data_received(bytes(LEAST_BODY_RATE))
        await asyncio.sleep(0)
        timers.now += 1.0
    assert timers.now > 4 * BODY_GRACE_S
    while not transport.closed:
        timers.fire()
    assert transport.written.startswith(b"HTTP/1.1 408 ")
    assert timers.now >= BODY_GRACE_S + 50  # what had come was worth fifty seconds, beyond those in hand


@asynchronous
async def test_a_trickle_does_not_keep_a_request_open() -> None:
    protocol, transport, timers = connected(reads_all)
    protocol.data_received(posted(10**6))
    while not transport.closed:
        second = timers.now
        protocol.data_received(b"x")
        while timers.now < second + 1 and not transport.closed:
            timers.fire()
    assert transport.written.startswith(b"HTTP/1.1 408 ")
    assert timers.now < BODY_GRACE_S + 4 * LAST_CHANCE_S


@asynchronous
async def test_time_in_which_the_server_does_not_read_is_not_the_clients() -> None:
    protocol, transport, timers = connected(never_answers)
    protocol.data_received(posted(10**6) + bytes(100_000))
    assert transport.paused
    for _ in range(20):
        timers.fire()
    assert not transport.closed


async def never_answers(scope: Any, receive: Any, send: Any) -> None:
    await asyncio.Event().wait()


@pytest.mark.parametrize("cut", [1, 7, 1024, 5000, 10**9])
@asynchronous
async def test_many_requests_in_one_write_are_each_answered(cut: int) -> None:
    """However their bytes are cut: the bytes of a head are counted for one request, not for the buffer."""
    count = 10_000 if cut > 100 else 500
    protocol, transport, _ = connected()
    data = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" * count
    most = 0
    for start in range(0, len(data), cut):
        protocol.data_received(data[start : start + cut])
        most = max(most, len(protocol.pipeline))
        await asyncio.sleep(0)
    while protocol.tasks:
        most = max(most, len(protocol.pipeline))
        await asyncio.sleep(0)
    assert transport.written.count(b"HTTP/1.1 200 ") == count
    assert b"431" not in transport.written and not transport.closed
    assert most < MOST_PIPELINED + PIECE_BYTES // 18  # parsed ones are some kilobytes each
    assert not transport.paused


@asynchronous
async def test_what_comes_while_requests_wait_is_held_back_unread() -> None:
    protocol, transport, timers = connected(never_answers)
    get = b"GET / HTTP/1.1\r\n\r\n"
    protocol.data_received(get * 1000 + b"GET / HT")
    assert transport.paused and len(protocol.pipeline) < 100
    protocol.flow.resume_reading()  # as every request does that looks after its client
    assert transport.paused
    for _ in range(5):  # the head that is not whole waits for our own answers
        if timers.armed:
            timers.fire()
    assert not transport.closed


@asynchronous
async def test_a_head_that_is_too_slow_is_not_answered_into_the_midst_of_a_stream() -> None:
    protocol, transport, timers = connected(streams)
    protocol.data_received(b"GET / HTTP/1.1\r\n\r\n")
    await asyncio.sleep(0)
    before = transport.written
    protocol.data_received(b"GET / HT")
    timers.fire()
    assert transport.closed and transport.written == before


async def streams(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"some", "more_body": True})
    await asyncio.Event().wait()


@asynchronous
async def test_a_client_that_reads_nothing_is_cut_off() -> None:
    protocol, transport, timers = connected(streams)
    protocol.data_received(b"GET / HTTP/1.1\r\n\r\n")
    await asyncio.sleep(0)
    protocol.pause_writing()
    assert [delay for delay, _, _ in timers.armed] == [READ_STALL_S]
    protocol.resume_writing()
    assert timers.armed == []
    protocol.pause_writing()
    timers.fire()
    assert transport.aborted


# real connections


@asynccontextmanager
async def serving(app: Any, limit: int, monitoring: int) -> AsyncIterator[int]:
    """A server with so much room; yields its port."""
    connection_limit = ConnectionLimit(limit, monitoring)
    config = uvicorn.Config(
        app,
        port=0,
        log_config=None,
        lifespan="off",
        http=partial(BoundedProtocol, connection_limit=connection_limit),  # type: ignore[arg-type]
    )
    server = uvicorn.Server(config)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        task = asyncio.create_task(server.serve([listener]))
        while not server.started:
            await asyncio.sleep(0)
        try:
            yield listener.getsockname()[1]
        finally:
            server.should_exit = server.force_exit = True
            await task


async def ask(port: int, path: str) -> bytes:
    """The status line of a request on a connection of its own."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET %s HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n" % path.encode())
    line = await reader.readline()
    writer.close()
    return line


HALVES = {"a body": posted(100), "a head": b"GET / HTT", "nothing": b""}


@pytest.mark.parametrize("half", HALVES)
@asynchronous
async def test_half_requests_on_all_connections_leave_room_for_health(half: str) -> None:
    async with serving(reads_all, limit=5, monitoring=3) as port:
        open_ones = [await asyncio.open_connection("127.0.0.1", port) for _ in range(30)]
        for _, writer in open_ones:
            with contextlib.suppress(OSError):
                writer.write(HALVES[half])
        await asyncio.sleep(0.05)
        for _ in range(5):
            assert (await ask(port, "/health")).startswith(b"HTTP/1.1 200 ")
        expected = b"HTTP/1.1 200 " if half == "nothing" else b"HTTP/1.1 503 "  # an idle one gives way
        assert (await ask(port, "/generate")).startswith(expected)
        for _, writer in open_ones:
            writer.close()


@asynchronous
async def test_ten_thousand_requests_in_one_write_get_ten_thousand_answers() -> None:
    async with serving(app, limit=5, monitoring=3) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" * 10_000)
        answers = 0
        while answers < 10_000:
            answers += (await reader.readuntil(b"\r\n\r\n")).count(b"HTTP/1.1 200 ")
        writer.close()


# the connection limit


class Someone:
    def __init__(self) -> None:
        self.gone = False

    def close_now(self) -> None:
        self.gone = True


def test_the_longest_idle_connection_gives_way() -> None:
    connection_limit, (a, b, c, d) = ConnectionLimit(limit=2, monitoring=1), [Someone() for _ in range(4)]
    assert connection_limit.add(a) and connection_limit.add(b)
    connection_limit.set_idle(a, idle=False)
    assert connection_limit.add(c)
    assert (a.gone, b.gone) == (False, True)
    connection_limit.set_idle(c, idle=False)
    assert not connection_limit.add(d)
    connection_limit.remove(a)
    assert connection_limit.add(b)


def test_beyond_the_limit_the_oldest_gives_way_to_the_next() -> None:
    connection_limit, busy, (a, b) = ConnectionLimit(limit=1, monitoring=1), Someone(), (Someone(), Someone())
    connection_limit.add(busy)
    connection_limit.set_idle(busy, idle=False)
    assert not connection_limit.add(a) and not connection_limit.add(b)
    assert (busy.gone, a.gone, b.gone) == (False, True, False)


def test_descriptors_bound_the_connections() -> None:
    code = "from quartet.http_gateway.http.connection_limit import connections_that_fit as fit; print(fit())"
    limited = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64)); {code}"
    said = subprocess.run([sys.executable, "-c", limited], capture_output=True, text=True, check=True).stdout
    assert 1 <= int(said) <= 64 - SPARE_DESCRIPTORS - MONITORING_PLACES
