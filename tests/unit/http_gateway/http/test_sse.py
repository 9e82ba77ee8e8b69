"""Streams of events: how they end when what they tell of fails on the way."""

import asyncio
import json
from collections.abc import AsyncGenerator
from typing import Any

import pytest

from quartet.http_gateway.http.sse import DONE, NATIVE, Event, EventStream, StreamFormat, frame
from quartet.http_gateway.ring.request_group import ClientGone
from quartet.runtime.errors import RequestError


async def two_events_then(fault: Exception) -> AsyncGenerator[bytes, None]:
    yield frame(Event(b"1"))
    yield frame(Event(b"2"))
    raise fault


def sent(events: AsyncGenerator[bytes, None], form: StreamFormat = NATIVE) -> list[bytes]:
    """The bodies of the messages that the response sends; the last one must say that it is the last."""
    messages: list[dict[str, Any]] = []

    async def send(message: Any) -> None:
        messages.append(message)

    async def receive() -> Any:
        raise AssertionError

    asyncio.run(EventStream(events, form)({}, receive, send))
    assert [message.get("more_body", True) for message in messages] == [True] * (len(messages) - 1) + [False]
    return [message["body"] for message in messages[1:]]


@pytest.mark.parametrize(
    ("fault", "words"),
    [(RequestError("no room", field="text"), "no room"), (KeyError("secret"), "Internal error: KeyError")],
)
def test_a_fault_on_the_way_is_told_before_the_end(fault: Exception, words: str) -> None:
    first, second, told, end = sent(two_events_then(fault))
    assert (first, second, end) == (frame(Event(b"1")), frame(Event(b"2")), DONE)
    assert json.loads(told.removeprefix(b"data: "))["error"]["message"] == words


def test_an_api_may_have_its_own_error_event_and_end() -> None:
    form = StreamFormat(error_type=b"error", end=b"")
    _, _, error, end = sent(two_events_then(RequestError("no room")), form)
    assert error.startswith(b"event: error\ndata: {") and end == b""


def test_nobody_is_told_when_the_client_has_gone() -> None:
    with pytest.raises(ClientGone):
        sent(two_events_then(ClientGone()))


def test_a_silent_stream_has_pings() -> None:
    pinged = asyncio.Event()
    form = StreamFormat(end=b"", ping=Event(b"{}", b"ping"), ping_interval_s=0.001)
    bodies: list[bytes] = []

    async def chunks() -> AsyncGenerator[bytes, None]:
        yield frame(Event(b"1"))
        await pinged.wait()
        yield frame(Event(b"2"))

    async def send(message: Any) -> None:
        bodies.append(message.get("body", b""))
        if b"ping" in bodies[-1]:
            pinged.set()

    asyncio.run(EventStream(chunks(), form)({}, lambda: asyncio.sleep(0), send))
    assert set(bodies[2:-2]) == {b"event: ping\ndata: {}\n\n"}
    assert (bodies[1], *bodies[-2:]) == (frame(Event(b"1")), frame(Event(b"2")), b"")


def test_a_stream_that_is_not_silent_has_none() -> None:
    form = StreamFormat(ping=Event(b"{}"), ping_interval_s=1000)
    assert sent(two_events_then(RequestError("x")), form)[1] == frame(Event(b"2"))
