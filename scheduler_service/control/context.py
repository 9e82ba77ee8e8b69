"""What the handlers of control commands may use of the scheduler that carries them out."""

from collections import OrderedDict
from collections.abc import Callable, Generator, Sequence, Sized
from typing import TYPE_CHECKING, Any, Protocol

from quartet.runtime.control import ControlCommand, DecideChange
from quartet.runtime.messages import Facts, Message, Request
from quartet.scheduler_service.core.planner import Planner

if TYPE_CHECKING:  # these load torch; the objects come with the scheduler
    from quartet.scheduler_service.control.adapter_queue import AdapterQueue
    from quartet.scheduler_service.execution.adapters import AdapterStore
    from quartet.scheduler_service.execution.experts import ExpertRecorder
    from quartet.scheduler_service.execution.memory_saver import MemorySaver
    from quartet.scheduler_service.execution.profile import Profile
    from quartet.scheduler_service.weights.update import Updates

REMEMBERED_DECISIONS = 64

Resumable = Generator[None, bool | None, list[Message]]
"""A handler that needs several steps. It is resumed once a step, and sent whether the step that comes is a long one."""

Handler = Callable[..., list[Message] | Resumable]
"""Takes a Context and its command; returns the messages to send on, a Reply as a rule. Raises CommandRefused."""


class Decisions:
    """The last decisions of the gateway, by the id of their command."""

    def __init__(self) -> None:
        self._words: OrderedDict[str, DecideChange] = OrderedDict()

    def note(self, word: DecideChange) -> None:
        self._words[word.change] = word
        while len(self._words) > REMEMBERED_DECISIONS:
            self._words.popitem(last=False)

    def of(self, change: str) -> DecideChange | None:
        """What was decided on a change; None: not yet known."""
        return self._words.get(change)


class ServingWorker(Protocol):
    """The model, as commands see it."""

    weight_version: str
    expert_recorder: "ExpertRecorder | None"  # None: the server does not record


class Context(Protocol):
    """The scheduler, as commands see it."""

    planner: Planner
    updates: "Updates | None"  # None: the weights stay as they are
    saver: "MemorySaver | None"  # None: memory is never released
    adapters: "AdapterStore | None"  # None: requests cannot name any
    adapter_queue: "AdapterQueue"
    facts: Facts | None  # which of several schedulers this is, for one
    profile: "Profile | None"  # a recording under way
    step_sleep_s: float  # before every step
    decisions: Decisions  # of the gateway, on changes that all schedulers make

    @property
    def worker(self) -> ServingWorker: ...

    @property
    def launched(self) -> Sized:
        """Steps that were launched and not collected."""
        ...

    @property
    def now(self) -> float:
        """Seconds on the scheduler's clock."""
        ...

    @property
    def epoch(self) -> int:
        """Which incarnation of the scheduler this is."""
        ...

    @property
    def requests(self) -> Sequence[Request]:
        """All that have not ended."""
        ...

    def has_unfinished(self, kind: type[ControlCommand]) -> bool:
        """Whether an earlier command of this kind is not finished."""
        ...

    def emit(self, messages: list[Message]) -> None:
        """Send messages now, before those that the handler returns."""
        ...

    def abort(self, rid: str, reason: str = "") -> list[Message]:
        """End one request and return its last messages; none if the rid is unknown."""
        ...

    def forget_released(self) -> None:
        """Have the worker drop the state of sequences that have left the batch."""
        ...

    def pause_without_memory(self) -> None:
        """Compute nothing while memory or weights are missing; go on when all is there."""
        ...

    def memory_state(self) -> dict[str, Any]:
        """{"asleep": whether no step runs for lack of memory or weights, "lacks": the released tags that cause it}"""
        ...

    def adapters_changed(self) -> None:
        """Have no request match KV of a version of an adapter that is gone, and tell the gateway."""
        ...

    def tell_state(self) -> None:
        """Tell the gateway the state, though it has not asked."""
        ...

    def counters(self) -> dict[str, Any]:
        """The counters of this service for a Probe, by name."""
        ...


def abort_all(context: Context) -> list[Message]:
    """End all requests and return their last messages."""
    return [message for rid in [request.rid for request in context.requests] for message in context.abort(rid)]
