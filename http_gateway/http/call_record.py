"""What is noted of an HTTP call that may reach the model, for the request log and for traces.

The outermost middleware puts a CallRecord into the scope where somebody wants it; `run_group` fills it. Without a
request log and traces there is none, and nothing is noted.
"""

import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import msgspec

from quartet.http_gateway.http.auth import HeaderList
from quartet.http_gateway.ring.request_group import RequestDelta
from quartet.runtime.limits import MAX_LOGGED_REQUESTS, MAX_LOGGED_TEXT_CHARS
from quartet.runtime.messages import Generate, Text, Timeline

CALL = "quartet.call"  # scope key of the CallRecord
ID_BYTES = 4
CLIENT_LEFT = 499  # as nginx reports calls whose client has gone before the answer


class RequestRecord:
    """One request of a call."""

    def __init__(self, rid: str) -> None:
        self.rid = rid
        self.prompt_tokens = 0
        self.cached_tokens = 0
        self.output_tokens = 0
        self.queue_s: float | None = None
        self.first_at = 0.0  # when its first message came; 0: none has
        self.last_at = 0.0
        self.times: Timeline | None = None  # where the call is traced
        self.finish = ""
        self.output = ""  # where texts are kept: its beginning

    def add(self, text: Text, now: float, keeps_text: bool) -> None:
        """Note one step of the request."""
        tokens = text.tokens
        self.first_at, self.last_at = self.first_at or now, now
        self.times = tokens.times or self.times
        self.queue_s = tokens.queue_s if self.queue_s is None else self.queue_s
        self.prompt_tokens = tokens.prompt_tokens or self.prompt_tokens
        self.cached_tokens = max(self.cached_tokens, tokens.cached_tokens)
        self.output_tokens += len(tokens.ids) // ID_BYTES
        if tokens.finish is not None:
            self.finish = tokens.finish.reason
        if keeps_text and len(self.output) <= MAX_LOGGED_TEXT_CHARS:
            self.output += text.text


class CallRecord:
    """One HTTP call: its requests, its status, its times (`time.monotonic`)."""

    def __init__(self, on_end: Callable[["CallRecord"], None], keeps_text: bool = False) -> None:
        """`on_end` is called once, at the end of the call or of the background run that it has begun."""
        self.started_at = time.monotonic()
        self.received_at = time.time()
        self.ended_at = 0.0
        self.route = ""
        self.method = ""
        self.request_id = ""  # x-request-id, as the client has given it
        self.status: int | None = None  # None: the client left before there was an answer
        self.trace: object | None = None  # of the tracer, where the call is traced
        self.requests: list[RequestRecord] = []
        self.prompts: list[str] = []  # where texts are kept: their beginnings
        self.goes_on = False  # behind its HTTP answer, in the background
        self._keeps_text = keeps_text
        self._on_end = on_end

    def sent(self, requests: Sequence[Generate]) -> None:
        """The requests of the call go into the ring."""
        self.requests = [RequestRecord(item.request.rid) for item in requests]
        if self.trace is not None:
            now = time.monotonic()
            for item in requests:
                item.times = Timeline(sent_at=now)
        if self._keeps_text:
            self.prompts = [prompt_text(item) for item in requests[:MAX_LOGGED_REQUESTS]]

    def heard(self, deltas: Iterable[RequestDelta]) -> None:
        """Steps of its requests have come back."""
        now = time.monotonic()
        for index, text in deltas:
            self.requests[index].add(text, now, self._keeps_text and index < MAX_LOGGED_REQUESTS)

    def end(self) -> None:
        """The call is over."""
        self.ended_at = time.monotonic()
        self._on_end(self)

    def fields(self) -> dict[str, Any]:
        """What the request log says, by name: no key and no header, and texts only where they are kept."""
        requests = self.requests
        ids = [request.rid for request in requests[:MAX_LOGGED_REQUESTS]]
        firsts = [request.first_at for request in requests if request.first_at]
        queues = [request.queue_s for request in requests if request.queue_s is not None]
        found: dict[str, Any] = {
            "id": ids[0] if len(ids) == 1 else ids or None,
            "request_id": self.request_id or None,
            "route": self.route,
            "status": CLIENT_LEFT if self.status is None else self.status,
            "requests": len(requests),
            "finish": ends_of(requests),
            "prompt_tokens": sum(request.prompt_tokens for request in requests),
            "cached_tokens": sum(request.cached_tokens for request in requests),
            "output_tokens": sum(request.output_tokens for request in requests),
            "queue_s": round(max(queues), 4) if queues else None,
            "first_token_s": round(min(firsts) - self.started_at, 4) if firsts else None,
            "total_s": round(self.ended_at - self.started_at, 4),
        }
        if self._keeps_text:
            found["prompts"] = self.prompts
            found["outputs"] = [shortened(request.output) for request in requests[:MAX_LOGGED_REQUESTS]]
        return found


class Tracer(Protocol):
    """Traces of calls (http_gateway/http/tracing.py)."""

    def begin(self, headers: HeaderList) -> object | None:
        """The trace of a call that begins; None: it is not sampled."""
        ...

    def end(self, record: CallRecord) -> None:
        """A traced call is over."""
        ...


def ends_of(requests: Sequence[RequestRecord]) -> str | dict[str, int] | None:
    """How the requests ended: one word, or how many by each; a request without an end counts as aborted."""
    counts = Counter(request.finish or "abort" for request in requests)
    return next(iter(counts), None) if len(counts) < 2 else dict(counts)


def prompt_text(item: Generate) -> str:
    """The prompt as it was sent, shortened."""
    if item.text is not None:
        return shortened(item.text)
    if item.chat is not None:
        return shortened(msgspec.json.encode(item.chat.messages).decode())
    return f"{(len(item.input_ids) // ID_BYTES)} ids" if item.input_ids else f"{len(item.embeds)} bytes of embeddings"


def shortened(text: str) -> str:
    cut = len(text) - MAX_LOGGED_TEXT_CHARS
    return text if cut <= 0 else f"{text[:MAX_LOGGED_TEXT_CHARS]}..."
