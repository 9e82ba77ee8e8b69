"""A batch as clients of OpenAI's API see it, and what is checked before it begins."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import msgspec

from quartet.http_gateway.batches.expiry import ExpiresAfter
from quartet.runtime.batch import lines
from quartet.runtime.batch.lines import BadLine, Request
from quartet.runtime.errors import RequestError
from quartet.runtime.limits import MAX_BATCH_LINES

Status = Literal["validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"]
OVER = ("failed", "completed", "expired", "cancelled")
MOST_ERRORS = 100  # of a file's lines that are told
WINDOW = re.compile(r"([1-9][0-9]{0,3})([mhd])")
UNIT_S = {"m": 60, "h": 3600, "d": 86400}


class Counts(msgspec.Struct):
    total: int = 0
    completed: int = 0
    failed: int = 0


class Wrong(msgspec.Struct):
    """Why a batch has failed."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class WrongList(msgspec.Struct):
    data: list[Wrong]
    object: str = "list"


class Batch(msgspec.Struct, kw_only=True):
    """The object of the API; times are seconds since 1970."""

    id: str
    object: Literal["batch"] = "batch"
    endpoint: str
    errors: WrongList | None = None
    input_file_id: str
    completion_window: str
    status: Status = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: Counts = msgspec.field(default_factory=Counts)
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None

    @property
    def over(self) -> bool:
        return self.status in OVER

    @property
    def cancelling(self) -> bool:
        return self.status == "cancelling"

    def enter(self, status: Status, now: float) -> None:
        """Begin a state, and note when."""
        self.status = status
        setattr(self, f"{status}_at", int(now))


def window_s(window: str) -> int:
    """Seconds of a completion window. Raises RequestError."""
    found = WINDOW.fullmatch(window)
    if found is None:
        raise RequestError(
            "completion_window must be a number of minutes, hours or days, such as 24h.", field="completion_window"
        )
    return int(found[1]) * UNIT_S[found[2]]


def read_batch(path: Path, endpoint: str) -> Iterator[Request | BadLine]:
    """The lines of a batch's file."""
    with path.open("rb") as file:
        yield from lines.read(file, (endpoint,))


def check(path: Path, endpoint: str) -> tuple[int, list[Wrong]]:
    """How many requests the file has, and what is wrong with it: then nothing of it is sent."""
    wrong: list[Wrong] = []
    total = 0
    for line in read_batch(path, endpoint):
        total += 1
        if isinstance(line, BadLine) and len(wrong) < MOST_ERRORS:
            wrong.append(Wrong(line.failure.code, line.failure.message, line.failure.line))
    if not total:
        wrong.append(Wrong("empty_file", "The input file has no requests."))
    if total > MAX_BATCH_LINES:
        wrong.append(Wrong("too_many_requests", f"A batch has at most {MAX_BATCH_LINES} requests, this one {total}."))
    return total, wrong


def encode(batch: Batch) -> bytes:
    return msgspec.json.encode(batch)


def decode(data: bytes) -> Batch:
    return msgspec.json.decode(data, type=Batch)


def described(batch: Batch) -> Any:
    return msgspec.to_builtins(batch)
