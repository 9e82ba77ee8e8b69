"""Bounds on the head of a request, at the level of bytes."""

import asyncio
from typing import Any

import pytest
import uvicorn
from uvicorn.server import ServerState

from http_gateway.protocol import BoundedProtocol
from runtime.limits import HEADER_DEADLINE_S, MAX_HEADER_BYTES
from tests.unit.http_gateway.harness import asynchronous

KEEP_ALIVE_S = 75


class FakeTransport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""
        self.closed = False

    def write(self, data: Any) -> None:
        self.written += data

    def close(self) -> None:
        self.closed = True

    def is_closing(self) -> bool:
        return self.closed


class Timers:
    """The loop that the protocol sees: its timers are fired by the test."""

    def __init__(self) -> None:
        self.armed: list[tuple[float, Any, tuple[Any, ...]]] = []

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
        [(_, callback, arguments)] = self.armed
        callback(*arguments)


async def app(scope: Any, receive: Any, send: Any) -> None:
    await send({"type": "http.response.start", "status": 200, "headers": []})
    await send({"type": "http.response.body", "body": b"ok"})


def connected() -> tuple[BoundedProtocol, FakeTransport, Timers]:
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


@asynchronous
async def test_a_whole_head_has_no_deadline_and_a_long_body_is_no_head() -> None:
    protocol, transport, timers = connected()
    protocol.data_received(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 40000\r\n\r\n")
    assert timers.armed == []
    protocol.data_received(b"x" * 39_999)
    assert not transport.closed
    while protocol.tasks:
        await asyncio.sleep(0)
    assert transport.written.startswith(b"HTTP/1.1 200 ")


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
