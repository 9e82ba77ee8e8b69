"""Which of several schedulers a client has chosen: by a field of the body, or by a header."""

from collections.abc import Iterable
from typing import Protocol

from quartet.http_gateway.generation.intake import Job
from quartet.runtime.errors import RequestError

HEADER = b"x-data-parallel-rank"
FIELDS = ("data_parallel_rank", "routed_dp_rank")


class WithRank(Protocol):
    """A body whose client may choose the scheduler."""

    data_parallel_rank: int | None
    routed_dp_rank: int | None  # another name for it


def chosen_rank(body: WithRank, schedulers: int) -> int | None:
    """The rank that a body asks for under either name. Raises RequestError."""
    given = {name: rank for name in FIELDS if (rank := getattr(body, name)) is not None}
    for name, rank in given.items():
        check_rank(name, rank, schedulers, name)
    if len(set(given.values())) > 1:
        raise RequestError(f"{FIELDS[0]} and {FIELDS[1]} mean the same and disagree.", field=FIELDS[1])
    return next(iter(given.values()), None)


def apply_header(headers: Iterable[tuple[bytes, bytes]], job: Job, schedulers: int) -> None:
    """Give the requests that have chosen nothing themselves the rank of the header. Raises RequestError."""
    given = next((value.decode("latin-1") for name, value in headers if name == HEADER), "")
    if not given:
        return
    check_rank("X-Data-Parallel-Rank", int(given) if given.isdecimal() and len(given) < 9 else given, schedulers)
    for generate in [*job.requests, *job.warm]:
        if generate.request.wanted_rank is None:
            generate.request.wanted_rank = int(given)


def check_rank(name: str, rank: int | str, schedulers: int, field: str | None = None) -> None:
    if isinstance(rank, int) and 0 <= rank < schedulers:
        return
    known = "0: there is one rank" if schedulers == 1 else f"in 0..{schedulers - 1}"
    raise RequestError(f"{name} must be {known}, got {rank}.", field=field)
