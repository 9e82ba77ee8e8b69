"""Calls an endpoint of this server from within: no connection, no key, no access line."""

import asyncio
from collections.abc import MutableMapping
from typing import Any

from starlette.types import ASGIApp


async def call(app: ASGIApp, path: str, body: bytes) -> tuple[int, bytes]:
    """POST a JSON body; the status and the body of the answer. Cancelled, the request ends."""
    scope = {
        "type": "http",
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "root_path": "",
        "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
        "client": None,
        "server": None,
    }
    unsent = [{"type": "http.request", "body": body, "more_body": False}]
    status = 0
    parts: list[bytes] = []

    async def receive() -> MutableMapping[str, Any]:
        if not unsent:
            await asyncio.Event().wait()  # this client never leaves
        return unsent.pop()

    async def send(message: MutableMapping[str, Any]) -> None:
        nonlocal status
        if message["type"] == "http.response.start":
            status = message["status"]
        else:
            parts.append(message.get("body", b""))

    await app(scope, receive, send)
    return status, b"".join(parts)
