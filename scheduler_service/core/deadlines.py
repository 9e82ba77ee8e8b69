"""How long requests may wait and run. The clock stands still while the server rests: a pause is nobody's fault."""

from collections.abc import Iterable

from quartet.runtime.errors import Kind, RequestError
from quartet.scheduler_service.core.request import Sequence

WAITED = "Request waiting timeout reached."
RAN = "Request running timeout reached."
LOOK_EVERY_S = 0.05


class Deadlines:
    """Counts the time in which something could be computed, and knows who has had too much of it."""

    def __init__(self, waiting_s: float | None, running_s: float | None) -> None:
        """None: without limit."""
        self._waiting_s = waiting_s
        self._running_s = running_s
        self._clock_s = 0.0
        self._seen_at = 0.0
        self._look_at_s = 0.0

    def tick(self, now: float, resting: bool) -> None:
        """Time has come to `now`; call it at every turn of the loop."""
        if not resting:
            self._clock_s += max(0.0, now - self._seen_at)
        self._seen_at = now

    def start(self, sequence: Sequence) -> None:
        """It waits, or runs for the first time, from now on."""
        sequence.since_s = self._clock_s

    def late(self, live: Iterable[Sequence]) -> list[tuple[Sequence, RequestError]]:
        """Those whose time is over, with what their clients are told. Looks through all of them now and then."""
        if (self._waiting_s is None and self._running_s is None) or self._clock_s < self._look_at_s:
            return []
        self._look_at_s = self._clock_s + LOOK_EVERY_S
        found = []
        for sequence in live:
            limit_s, message = (self._running_s, RAN) if sequence.started else (self._waiting_s, WAITED)
            if limit_s is not None and self._clock_s - sequence.since_s > limit_s:
                found.append((sequence, RequestError(message, Kind.UNAVAILABLE)))
        return found
