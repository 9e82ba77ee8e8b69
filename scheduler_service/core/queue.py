"""The queue of requests that wait for admission. It holds them in no order: the scheduling policy orders them."""

from collections.abc import Iterator, Mapping

from quartet.scheduler_service.core.request import Sequence


class WaitingQueue:
    """New requests, and those that were sent back.

    It also gives each request its namespace in the prefix cache: what was computed before `invalidate_prefixes` is
    never matched by a request that is admitted later, nor is what another version of an adapter has computed.
    """

    def __init__(self, max_queued: int | None, by_priority: bool) -> None:
        """`max_queued`: requests that may wait without a free slot for them; None: any number."""
        self._max_queued = max_queued
        self._by_priority = by_priority
        self._waiting: dict[Sequence, None] = {}
        self._arrivals = 0
        self._generation = 0  # of cached KV
        self._adapter_versions: Mapping[str, str] = {}  # by name; no two adapters have the same

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        return iter(self._waiting)

    def __contains__(self, sequence: Sequence) -> bool:
        return sequence in self._waiting

    def number(self, sequence: Sequence) -> None:
        """Give a request its place in the order of arrival, which it keeps."""
        self._arrivals += 1
        sequence.serial = self._arrivals

    def put(self, sequence: Sequence) -> None:
        self._waiting[sequence] = None
        self._set_namespace(sequence)

    def remove(self, sequence: Sequence) -> None:
        del self._waiting[sequence]

    def overflow(self, newcomer: Sequence, free_slots: int) -> Sequence | None:
        """Which request must end if the newcomer is to wait too: the newcomer, or (priority policy) a lower one.

        None while there is space. A request that was admitted before is never the one.
        """
        if self._max_queued is None or len(self._waiting) - free_slots < self._max_queued:
            return None
        if self._by_priority:
            last = min(self._waiting, key=lambda s: (s.priority, -s.serial))
            admitted_before = last.update_sent or last.request.again
            if last.priority < newcomer.priority and not admitted_before:
                return last
        return newcomer

    def invalidate_prefixes(self) -> int:
        """Have no request that waits, or comes later, match KV that was computed before now: a generation has begun."""
        self._generation += 1
        for sequence in self._waiting:
            self._set_namespace(sequence)
        return self._generation

    def set_adapter_versions(self, versions: Mapping[str, str]) -> None:
        """Have requests that wait, or come later, match only KV of these versions of their adapters."""
        self._adapter_versions = versions
        for sequence in self._waiting:
            self._set_namespace(sequence)

    def _set_namespace(self, sequence: Sequence) -> None:
        request = sequence.request
        version = self._adapter_versions[request.adapter] if request.adapter else ""  # without a "/"
        sequence.namespace = f"{self._generation}/{version}/{request.extra_key}"
