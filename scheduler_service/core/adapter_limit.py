"""At most so many different LoRA adapters run at once: who may be admitted next."""

from collections.abc import Iterable
from functools import cached_property

from quartet.scheduler_service.core.request import Sequence

MAX_OVERTAKEN = 64  # requests with adapters that may be admitted before an earlier one that needs another adapter


class AdapterLimit:
    """The adapters of what runs, in one decision of the planner."""

    def __init__(self, most: int, running: Iterable[Sequence]) -> None:
        self.most = most
        self._running = running
        self.held: Sequence | None = None  # the first that has to wait for an adapter of others to end

    @cached_property
    def active(self) -> set[str]:
        """The adapters that run; looked for when a request names one."""
        return {sequence.request.adapter for sequence in self._running} - {""}

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
        if self.has_room(sequence) and (self.held is None or self.held.overtaken < MAX_OVERTAKEN):
            return True
        self.held = self.held or sequence
        return False

    def started(self, sequence: Sequence) -> None:
        """The request was admitted."""
        if adapter := sequence.request.adapter:
            self.active.add(adapter)
            if self.held is not None:
                self.held.overtaken += 1
