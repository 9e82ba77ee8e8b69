"""One streamed answer of /v1/chat/completions."""

import json
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from typing import Any, NamedTuple

import httpx
import msgspec

from quartet.runtime.client.connection import (
    MAX_ANSWER_BYTES,
    ClientError,
    ErrorDetail,
    check,
    read_answer,
    unreachable,
)
from quartet.runtime.client.events import EventReader

PATH = "/v1/chat/completions"
JSON = {"Content-Type": "application/json"}


class Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None  # the same, by another name that is in use


class Choice(msgspec.Struct):
    delta: Delta | None = None
    finish_reason: str | None = None


class CachedTokens(msgspec.Struct):
    cached_tokens: int | None = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: CachedTokens | None = None


class Chunk(msgspec.Struct):
    """An event of a stream, here and on other servers: what they leave out may be null, an error may be its text."""

    choices: list[Choice] | None = None
    usage: Usage | None = None
    error: ErrorDetail | str | None = None


DECODER = msgspec.json.Decoder(Chunk)


def reason_of(error: ErrorDetail | str) -> str:
    """Why a stream ends with an error, in words."""
    text = error if isinstance(error, str) else error.message
    return text or "the server gave the answer up"


class Piece(NamedTuple):
    """What one event adds: thought, text, or neither."""

    thought: str = ""
    text: str = ""


class Answer:
    """One answer while it arrives: iterate over its pieces. Closing it early has the server drop the request."""

    def __init__(self, client: httpx.Client, body: dict[str, Any], clock: Callable[[], float] = time.monotonic) -> None:
        self.text = ""
        self.usage: Usage | None = None
        self.finish_reason: str | None = None
        self._client = client
        self._body = body | {"stream": True, "stream_options": {"include_usage": True}}
        self._clock = clock
        self._sent_at = 0.0
        self._first_at: float | None = None
        self._last_at = 0.0

    def pieces(self) -> Generator[Piece, None, None]:
        """Send the request and yield what arrives. Raises ClientError."""
        self._sent_at = self._last_at = self._clock()
        try:
            body = json.dumps(self._body).encode()  # what was typed may be no Unicode text: it goes as escapes
            with self._client.stream("POST", PATH, content=body, headers=JSON) as response:
                if response.status_code >= 400:
                    check(response.status_code, read_answer(response))
                with closing(self._read(response.iter_raw())) as pieces:
                    yield from pieces
        except httpx.HTTPError as error:
            raise unreachable(self._client.base_url, error) from error

    def _read(self, body: Iterator[bytes]) -> Generator[Piece, None, None]:
        reader = EventReader(MAX_ANSWER_BYTES)
        for part in body:
            for event in reader.feed(part):
                yield from self._take(event)
            if reader.ended:
                return
        if not reader.ended and self.finish_reason is None:
            raise ClientError("the stream ended before the answer did")

    def _take(self, event: bytes) -> Iterator[Piece]:
        try:
            chunk = DECODER.decode(event)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise ClientError(f"the server sent an event that is no chunk of an answer ({error})") from error
        if chunk.error is not None:
            raise ClientError(reason_of(chunk.error))
        self.usage = chunk.usage or self.usage
        for choice in (chunk.choices or [])[:1]:
            delta = choice.delta or Delta()
            piece = Piece(delta.reasoning_content or delta.reasoning or "", delta.content or "")
            self.finish_reason = choice.finish_reason or self.finish_reason
            if piece.thought or piece.text:
                self._last_at = self._clock()
                self._first_at = self._last_at if self._first_at is None else self._first_at
                self.text += piece.text
                yield piece

    def figures(self) -> str:
        """Tokens, speed and time to the first token, in words; empty if nothing was counted."""
        if self.usage is None or self._first_at is None:
            return ""
        tokens, took_s = self.usage.completion_tokens, self._last_at - self._first_at
        speed = f", {(tokens - 1) / took_s:.1f} tokens/s" if tokens > 1 and took_s > 0 else ""
        cut = ", cut at the longest length" if self.finish_reason == "length" else ""
        waited_s = self._first_at - self._sent_at
        return f"{tokens} token{'s' if tokens != 1 else ''}{speed}, first after {waited_s:.2f} s{cut}"
