"""Time limits of requests that wait or run. Time in which the server computes nothing (a pause) does not count."""

from collections.abc import Iterable

from quartet.runtime.errors import Kind, RequestError
from quartet.scheduler_service.core.request import Sequence

WAITED = "Request waiting timeout reached."
RAN = "Request running timeout reached."
CHECK_INTERVAL_S = 0.05


class Deadlines:
    """Keeps a clock that stops during pauses, and finds the requests that are over their limit by it."""

    def __init__(self, waiting_s: float | None, running_s: float | None) -> None:
        """None: without limit."""
        self._waiting_s = waiting_s
        self._running_s = running_s
        self._clock_s = 0.0
        self._last_now = 0.0
        self._next_check_s = 0.0

    def advance(self, now: float, paused: bool) -> None:
        """Move the clock on to `now`, or leave it where it is when the time since the last call was a pause."""
        if not paused:
            self._clock_s += max(0.0, now - self._last_now)
        self._last_now = now

    @property
    def clock_s(self) -> float:
        """Seconds that were counted so far."""
        return self._clock_s

    def waited(self, since_s: float) -> RequestError | None:
        """The end of a request that waits elsewhere since the clock showed `since_s`; None as long as it may wait."""
        if self._waiting_s is None or self._clock_s - since_s <= self._waiting_s:
            return None
        return RequestError(WAITED, Kind.UNAVAILABLE)

    def start(self, sequence: Sequence) -> None:
        """Measure the time of a request that has arrived, or was admitted for the first time, from now on."""
        sequence.timed_from_s = self._clock_s

    def expired(self, live: Iterable[Sequence]) -> list[tuple[Sequence, RequestError]]:
        """The requests over their limit, each with its error. Looks through them every CHECK_INTERVAL_S only."""
        if (self._waiting_s is None and self._running_s is None) or self._clock_s < self._next_check_s:
            return []
        self._next_check_s = self._clock_s + CHECK_INTERVAL_S
        found = []
        for sequence in live:
            limit_s, message = (self._running_s, RAN) if sequence.started else (self._waiting_s, WAITED)
            if limit_s is not None and self._clock_s - sequence.timed_from_s > limit_s:
                found.append((sequence, RequestError(message, Kind.UNAVAILABLE)))
        return found
