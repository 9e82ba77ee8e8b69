"""A request that offers another protocol is answered in this one, body and all, and so is what follows it."""

import asyncio
from typing import Any

import pytest

from tests.unit.http_gateway.harness import asynchronous
from tests.unit.http_gateway.http.test_protocol import connected

OFFER = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAEAAEAA\r\nHost: x\r\n"  # as Java's
POST = b"POST /a HTTP/1.1\r\n" + OFFER
NEXT = b"GET /b HTTP/1.1\r\nHost: x\r\n\r\n"
LONG = b"x" * 5000


async def echoes(scope: Any, receive: Any, send: Any) -> None:
    """Answers with the path and the body."""
    body, more = b"", True
    while more:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    text = b"<" + scope["raw_path"] + b" " + body + b">"
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(text))]})
    await send({"type": "http.response.body", "body": text})


@pytest.mark.parametrize("step", [1, 7, 1024, 1 << 20])
@pytest.mark.parametrize(
    ("request_bytes", "answers"),
    [
        (POST + b"Content-Length: 4\r\n\r\nabcd", [b"</a abcd>"]),
        (POST + b"Content-Length: 0\r\n\r\n", [b"</a >"]),
        (POST + b"Content-Length: 5000\r\n\r\n" + LONG, [b"</a " + LONG + b">"]),
        (POST + b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n0\r\n\r\n", [b"</a abcd>"]),
        (2 * (POST + b"Content-Length: 1\r\n\r\na"), [b"</a a>", b"</a a>"]),
        (b"GET /a HTTP/1.1\r\n" + OFFER + b"\r\n", [b"</a >"]),
        (b"GET /a HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\nHost: x\r\n\r\n", [b"</a >"]),
        (POST + b"Content-Length: %d\r\n\r\n" % len(NEXT) + NEXT, [b"</a " + NEXT + b">"]),
    ],
)
@asynchronous
async def test_the_body_behind_an_offer_is_read_and_the_next_request_too(
    request_bytes: bytes, answers: list[bytes], step: int
) -> None:
    protocol, transport, _ = connected(echoes)
    data = request_bytes + NEXT
    for start in range(0, len(data), step):
        protocol.data_received(data[start : start + step])
    while protocol.tasks:
        await asyncio.sleep(0)
    heads, bodies = transport.written.split(b"HTTP/1.1 200 OK\r\n"), [*answers, b"</b >"]
    assert [head.partition(b"\r\n\r\n")[2] for head in heads[1:]] == bodies
    assert not transport.closed


@pytest.mark.parametrize(
    "framing", [b"Content-Length: 4\r\nTransfer-Encoding: chunked", b"Content-Length: 4\r\nContent-Length: 5"]
)
@asynchronous
async def test_a_body_of_two_lengths_is_refused_behind_an_offer_too(framing: bytes) -> None:
    protocol, transport, _ = connected(echoes)
    protocol.data_received(POST + framing + b"\r\n\r\n0\r\n\r\n")
    assert transport.written.startswith(b"HTTP/1.1 400 ") and transport.closed
    protocol.connection_lost(None)
