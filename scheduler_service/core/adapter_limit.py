"""At most so many different LoRA adapters run at once: who may be admitted next."""

from collections.abc import Iterable

from quartet.scheduler_service.core.request import Sequence

MAX_OVERTAKEN = 64  # requests with adapters that may be admitted before an earlier one that needs another adapter


class AdapterLimit:
    """The adapters of what runs, and the request that waits for one of them to end."""

    def __init__(self, most: int, running: Iterable[Sequence], waiting: Iterable[Sequence]) -> None:
        self.most = most
        self._running, self._waiting = running, waiting
        self._active: set[str] | None = None  # None: not looked for yet
        self.held: Sequence | None = None  # over all decisions, until it is admitted or ends

    def begin(self) -> None:
        """Another decision of the planner: other requests run and wait."""
        self._active = None
        if self.held is not None and self.held not in self._waiting:
            self.held = None

    @property
    def active(self) -> set[str]:
        """The adapters that run; looked for when a request names one."""
        if self._active is None:
            self._active = {sequence.request.adapter for sequence in self._running} - {""}
        return self._active

    def has_room(self, sequence: Sequence) -> bool:
        """Whether the request's adapter runs already, or one more may."""
        adapter = sequence.request.adapter
        return not adapter or adapter in self.active or len(self.active) < self.most

    def may_start(self, sequence: Sequence) -> bool:
        """Ask in the policy's order. Requests with other adapters may overtake one that is held back, but not for ever.

        Requests for the base are never held back.
        """
        if not sequence.request.adapter:
            return True
        if self.has_room(sequence) and not (self._overtakes(sequence) and self._has_waited_enough):
            return True
        self.held = self.held or sequence
        return False

    def started(self, sequence: Sequence) -> None:
        """The request was admitted."""
        if adapter := sequence.request.adapter:
            self.active.add(adapter)
            if sequence is self.held:
                self.held = None
            elif self.held is not None and self._overtakes(sequence):
                self.held.overtaken += 1

    @property
    def _has_waited_enough(self) -> bool:
        return self.held is not None and self.held.overtaken >= MAX_OVERTAKEN

    def _overtakes(self, sequence: Sequence) -> bool:
        """Whether a request is before the one that is held though its priority is not."""
        return self.held is not None and sequence is not self.held and sequence.priority <= self.held.priority
