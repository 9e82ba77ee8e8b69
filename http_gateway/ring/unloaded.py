"""Adapters that were unloaded, and that unfinished requests may still need.

A request may come again behind the end of its adapter: its own end was lost with a process of the ring, or it is held
back here while suspects run (quarantine.py). Only the journal knows of such requests. So a scheduler says which
unloaded adapters it keeps, and forgets one when it is told that no unfinished request names it, of any scheduler: new
ones cannot name it. What was lost with a process is said again, for whoever starts again has the schedulers say their
facts.
"""

from collections.abc import Callable, Mapping, Sequence

from quartet.http_gateway.ring.journal import JournalEntry
from quartet.http_gateway.ring.schedulers import Schedulers
from quartet.runtime.adapters import ForgetAdapter
from quartet.runtime.messages import Message


class UnloadedAdapters:
    """Of all schedulers."""

    def __init__(
        self, schedulers: Schedulers, unfinished: Mapping[str, JournalEntry], send: Callable[[Sequence[Message]], None]
    ) -> None:
        """`unfinished`: the journal, which changes."""
        self._schedulers = schedulers
        self._unfinished = unfinished
        self._send = send

    def request_ended(self, adapter: str) -> None:
        """An unfinished request has ended, which has named this adapter; "": none.

        There may be thousands of them. Those that name an unloaded adapter are older than most, and found at once.
        """
        kept = [(one.rank, one.unloaded[adapter]) for one in self._schedulers.all if adapter in one.unloaded]
        if kept and all(entry.request.adapter != adapter for entry in self._unfinished.values()):
            self._send([ForgetAdapter(lora_name=adapter, version=version, rank=rank) for rank, version in kept])

    def look(self) -> None:
        """Have each scheduler forget those that no unfinished request names."""
        kept = [(one.rank, *adapter) for one in self._schedulers.all for adapter in one.unloaded.items()]
        needed = {entry.request.adapter for entry in self._unfinished.values()} if kept else set()
        unneeded: list[Message] = [
            ForgetAdapter(lora_name=name, version=version, rank=rank)
            for rank, name, version in kept
            if name not in needed
        ]
        if unneeded:
            self._send(unneeded)
