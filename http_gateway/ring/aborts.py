"""Which requests an abort matches, how they end, and the aborts that a death in the ring may have lost."""

from collections import deque
from collections.abc import Collection, Mapping

from quartet.http_gateway.ring.journal import JournalEntry
from quartet.runtime.control import Abort
from quartet.runtime.messages import ABORTED, Finish

RELAYED_ABORTS = 1024  # the last ones, kept in case the tokenizer dies with them


class RelayedAborts:
    """The last aborts that the detokenizer has sent at stop strings, with their serial numbers."""

    def __init__(self) -> None:
        self._kept: deque[tuple[int, Abort]] = deque(maxlen=RELAYED_ABORTS)

    def note(self, serial: int, abort: Abort) -> None:
        self._kept.append((serial, abort))

    def to_repeat(self, pending: Mapping[str, JournalEntry], lost: Collection[str]) -> list[Abort]:
        """The aborts to send again: their request has ended here, or waits for its last message.

        Left out are those whose rid belongs to a later request, and those of `lost` requests, which run again to their
        stop string.
        """
        aborts = []
        for serial, abort in self._kept:
            entry = pending.get(abort.rid)
            if entry is None or (entry.serial < serial and entry.rid not in lost):
                aborts.append(abort)
        return aborts

    def forget(self, rank: int) -> None:
        """This scheduler has ended: there is nothing to abort in the next one."""
        left = [(serial, abort) for serial, abort in self._kept if abort.rank != rank]
        self._kept = deque(left, maxlen=RELAYED_ABORTS)


def abort_finish(abort: Abort) -> Finish:
    """The end of a request that is not in the ring."""
    return Finish(reason="abort", message=abort.abort_message or ABORTED)


def matches(command: Abort, entry: JournalEntry) -> bool:
    """Whether the command aborts this request."""
    if command.abort_all:
        return True
    if not command.rid:
        return False
    if command.exact:
        return command.rid == entry.rid
    if command.prefix:
        return entry.request.rid.startswith(command.rid) or entry.parent.startswith(command.rid)
    return command.rid in (entry.request.rid, entry.parent)
