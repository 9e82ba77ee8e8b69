"""The lines of a batch: requests in, answers out, in OpenAI's format.

in    {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {...}}
out   {"id": "batch_req_...", "custom_id": "a", "response": {"status_code": 200, "request_id": "...", "body": {...}},
       "error": null}

What cannot be sent is a line too: its `error` has a code, a message that names the line, and the line's number.
"""

import hashlib
import uuid
from codecs import BOM_UTF8
from collections.abc import Container, Iterator
from typing import Any, BinaryIO, Literal, NamedTuple

import msgspec

from quartet.runtime.limits import MAX_BATCH_LINE_BYTES, MAX_CUSTOM_ID_CHARS
from quartet.runtime.shorten import short

URLS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
OK = 200


class Request(NamedTuple):
    """A line that can be sent. `body`: a JSON object."""

    number: int  # of the line, from 1
    custom_id: str
    url: str
    body: bytes

    @property
    def result_id(self) -> str:
        """The id of its result, which follows from what is asked: a result of another request is seen by it."""
        asked = b"\0".join((self.custom_id.encode(errors="surrogatepass"), self.url.encode(), self.body))
        return f"batch_req_{hashlib.blake2b(asked, digest_size=16).hexdigest()}"


class Failure(msgspec.Struct):
    """Why there is no answer. `line`: its number, where the line itself is wrong."""

    code: str
    message: str
    line: int | None = None


class BadLine(NamedTuple):
    """A line that cannot be sent."""

    custom_id: str | None
    failure: Failure


class Answer(msgspec.Struct):
    """What the server has answered; `body` is any JSON."""

    status_code: int
    request_id: str
    body: msgspec.Raw


class Entry(msgspec.Struct, kw_only=True):
    """A line of the results."""

    id: str
    custom_id: str | None
    response: Answer | None = None
    error: Failure | None = None

    @property
    def succeeded(self) -> bool:
        return self.response is not None and self.response.status_code == OK


class Line(msgspec.Struct):
    """What a line must hold."""

    custom_id: str
    url: str
    body: dict[str, msgspec.Raw]
    method: Literal["POST"] = "POST"


class Named(msgspec.Struct):
    """What is known of a line that is wrong."""

    custom_id: Any = None


def read(file: BinaryIO, urls: Container[str] = URLS) -> Iterator[Request | BadLine]:
    """The lines of a batch, one by one; empty ones are left out, and a custom_id counts where it is first."""
    seen: set[str] = set()
    number = 0
    while text := file.readline(MAX_BATCH_LINE_BYTES + 1):
        number += 1
        text = text.removeprefix(BOM_UTF8) if number == 1 else text
        if len(text) > MAX_BATCH_LINE_BYTES:
            while not text.endswith(b"\n") and text:
                text = file.readline(MAX_BATCH_LINE_BYTES)
            yield wrong(None, number, "line_too_long", f"it has more than {MAX_BATCH_LINE_BYTES} bytes")
        elif text.strip():
            line = parse(text, number, urls)
            if isinstance(line, Request) and line.custom_id in seen:
                again = f"custom_id {short(line.custom_id)!r} stands on an earlier line too"
                yield wrong(line.custom_id, number, "duplicate_custom_id", again)
                continue
            if isinstance(line, Request):
                seen.add(line.custom_id)
            yield line


def parse(text: bytes, number: int, urls: Container[str] = URLS) -> Request | BadLine:
    """One line. What is wrong with it is said by field."""
    try:
        text.decode()
        line = msgspec.json.decode(text, type=Line)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return wrong(name_of(text), number, "invalid_json_line", str(error))
    if not line.custom_id or len(line.custom_id) > MAX_CUSTOM_ID_CHARS:
        return wrong(None, number, "invalid_custom_id", f"custom_id must have 1 to {MAX_CUSTOM_ID_CHARS} characters")
    if line.url not in urls:
        why = "is not the endpoint of this batch" if line.url in URLS else "is not one that is served here"
        return wrong(line.custom_id, number, "invalid_url", f"url {short(line.url)!r} {why}")
    for name in ("stream", "background"):
        if bytes(line.body.get(name, b"null")) == b"true":
            return wrong(line.custom_id, number, "invalid_request", f"{name}: in a batch, every answer is waited for")
    return Request(number, line.custom_id, line.url, msgspec.json.encode(line.body))


def name_of(text: bytes) -> str | None:
    """The custom_id of a line that is otherwise wrong; None where it has none."""
    try:
        name = msgspec.json.decode(text, type=Named).custom_id
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None
    return name if isinstance(name, str) and 0 < len(name) <= MAX_CUSTOM_ID_CHARS else None


def wrong(custom_id: str | None, number: int, code: str, reason: str) -> BadLine:
    return BadLine(custom_id, Failure(code, f"line {number}: {reason}", number))


def answered(custom_id: str, status: int, body: bytes, result_id: str = "") -> Entry:
    """The line of an answer; what is no JSON becomes a JSON string."""
    try:
        text = msgspec.Raw(msgspec.json.format(body, indent=-1))  # on one line
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = msgspec.Raw(msgspec.json.encode(body.decode(errors="replace")))
    return Entry(
        id=result_id or new_id(), custom_id=custom_id, response=Answer(status, f"req_{uuid.uuid4().hex}", text)
    )


def failed(custom_id: str | None, failure: Failure) -> Entry:
    return Entry(id=new_id(), custom_id=custom_id, error=failure)


def new_id() -> str:
    return f"batch_req_{uuid.uuid4().hex}"
