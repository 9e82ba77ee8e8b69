"""Requests whose adapter is not in memory. They wait here until it was read, before the planner queues them.

An adapter is read in the background, while steps go on. It takes the place of one that no admitted request uses; as
long as there is none, all requests with adapters wait in the order of their arrival, so that those for adapters in
memory cannot keep the others out. Requests for the base never wait here.
"""

from collections.abc import Callable, Collection, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from quartet.runtime.adapters import LORA_OFF, NEVER_LOADED
from quartet.runtime.errors import CommandRefused, Kind, RequestError, StartupError
from quartet.runtime.messages import Request, Tokenized
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.grammar.matchers import Grammar

if TYPE_CHECKING:  # it loads torch; the object comes with the scheduler
    from quartet.scheduler_service.execution.adapters import AdapterStore, Known, Read

NOT_READ = "The adapter {} cannot be read: {}"


@dataclass(slots=True)
class Waiting:
    """A request that waits, with its compiled grammar."""

    message: Tokenized
    grammar: Grammar | None
    since_s: float  # by the clock of time limits

    @property
    def name(self) -> str:
        return self.message.request.adapter


Ready = tuple[Tokenized, Grammar | RequestError | None]  # the grammar, or why the adapter cannot be had


@dataclass(slots=True)
class Reading:
    """An adapter that is being read, or was and waits for room."""

    known: "Known"
    work: "Generator[None, bool | None, Read]"
    found: "Read | None" = None


class AdapterQueue:
    """Such requests by rid, in the order of their arrival."""

    def __init__(
        self,
        store: "AdapterStore | None",
        planner: Planner,
        on_change: Callable[[], None] = lambda: None,
        to_come: Callable[[], Collection[Request]] = list,
    ) -> None:
        """No store: requests that name an adapter are refused.

        `on_change`: another adapter is in memory. `to_come`: requests that were let in and wait for something else.
        """
        self._store = store
        self._planner = planner
        self._on_change = on_change
        self._waiting: dict[str, Waiting] = {}
        self._reading: Reading | None = None
        self._to_come = to_come
        self._unneeded: dict[str, str] = {}  # adapters that no unfinished request of the gateway names → version

    def __len__(self) -> int:
        return len(self._waiting)

    @property
    def requests(self) -> list[Request]:
        return [waiting.message.request for waiting in self._waiting.values()]

    def state(self) -> dict[str, Any]:
        """What of `Facts.state` is about adapters."""
        if self._store is None:
            return {}
        return {"adapters": self._store.state(), "unloaded_adapters": ending(self._store)}

    def let_go(self, name: str, version: str) -> None:
        """The gateway has no unfinished request that names this adapter: it is forgotten behind those that are here."""
        if self._store is not None and ending(self._store).get(name) == version:
            self._unneeded[name] = version

    def check(self, request: Request) -> None:
        """Raise RequestError for a request that arrives and names an adapter that is not there.

        The gateway refuses requests for an adapter that is unloaded. One that it took before is computed with it, also
        when it comes late, or again behind any restart.
        """
        name = request.adapter
        if not name:
            return
        if self._store is None:
            raise RequestError(LORA_OFF, field="lora_path")
        if name not in self._store.known:
            raise RequestError(NEVER_LOADED.format(name), field="lora_path")

    def takes(self, message: Tokenized, grammar: Grammar | None) -> bool:
        """Whether a request, which `check` has let in, has to wait here; if not, its adapter is in memory.

        A later attempt replaces an earlier one.
        """
        name, rid = message.request.adapter, message.request.rid
        if not name or self._store is None:
            return False
        if not self._waiting and self._store.use(name):
            return False
        earlier = self._waiting.get(rid)
        if earlier is None or message.request.attempt > earlier.message.request.attempt:
            self._waiting.pop(rid, None)
            self._waiting[rid] = Waiting(message, grammar, self._planner.deadlines.clock_s)
        return True

    def remove(self, rid: str) -> Tokenized | None:
        """Take out a request; None where there is no such one."""
        waiting = self._waiting.pop(rid, None)
        return waiting.message if waiting else None

    def take_ready(self) -> list[Ready]:
        """The first requests, as far as their adapters are in memory now, or cannot be read; and all over their limit.

        Call it at every turn of the loop: the work in the background goes on, and adapters that end are forgotten.
        """
        if self._store is not None and self._unneeded:
            self._forget_unneeded(self._store)
        ready = self._take_expired()
        taken: set[str] = set()  # adapters of these
        while self._waiting and self._store is not None:
            rid, first = next(iter(self._waiting.items()))
            outcome: Grammar | RequestError | None = first.grammar
            try:
                if not self._has(self._store, first.name, taken):
                    break
                taken.add(first.name)
            except RequestError as error:
                outcome = error
            del self._waiting[rid]
            ready.append((first.message, outcome))
        if not self._waiting:  # nobody needs what is being read
            self._abandon_reading()
        return ready

    def _abandon_reading(self) -> None:
        """Resume it no more; it ends by itself."""
        if self._reading is not None:
            self._reading.work.close()
        self._reading = None

    def _forget_unneeded(self, store: "AdapterStore") -> None:
        """Forget the adapters that end and that nobody names any more; one that was loaded again stays."""
        versions = ending(store)
        self._unneeded = {name: one for name, one in self._unneeded.items() if versions.get(name) == one}
        in_use = self._in_use({request.adapter for request in (*self.requests, *self._to_come())})
        ended = [name for name in self._unneeded if name not in in_use]
        for name in ended:
            del self._unneeded[name]
            store.forget(name)
        if ended:
            self._on_change()

    def _take_expired(self) -> list[Ready]:
        """The requests that have waited for too long: the first ones, since they are in the order of their arrival."""
        ended: list[Ready] = []
        while self._waiting:
            rid, first = next(iter(self._waiting.items()))
            if (error := self._planner.deadlines.waited(first.since_s)) is None:
                break
            del self._waiting[rid]
            ended.append((first.message, error))
        return ended

    def _has(self, store: "AdapterStore", name: str, taken: Collection[str]) -> bool:
        """Whether an adapter is in memory; if not, go on with reading it. Raises RequestError where that cannot be."""
        if store.use(name):
            return True
        known = store.known.get(name)
        if known is None:
            raise RequestError(NEVER_LOADED.format(name), field="lora_path")
        try:
            found = self._read(store, known)
            if found is None:
                return False
            if not store.has_room() and not store.evict_unused(self._in_use(taken)):
                return False
        except CommandRefused as refusal:
            self._reading = None
            raise RequestError(NOT_READ.format(name, refusal.message), Kind.UNAVAILABLE) from refusal
        self._reading = None
        store.bring_back(known, found)
        self._on_change()
        return True

    def _read(self, store: "AdapterStore", known: "Known") -> "Read | None":
        """What was read of an adapter; None as long as that takes. Raises CommandRefused."""
        if not store.has_room() and store.all_pinned:
            raise CommandRefused("all adapters in memory are pinned, and --max-loaded-loras allows no more")
        reading = self._reading
        try:
            if reading is None or reading.known is not known:  # for another one, or it was replaced meanwhile
                self._abandon_reading()
                reading = self._reading = Reading(known, store.in_background(lambda: read(store, known)))
                next(reading.work)
            elif reading.found is None:
                reading.work.send(self._planner.prefills_next)
        except StopIteration as end:
            assert reading is not None, "it has ended"
            reading.found = end.value
        return reading.found

    def _in_use(self, taken: Collection[str]) -> set[str]:
        """The adapters of requests that the planner has or gets now."""
        return {*taken, *(sequence.request.adapter for sequence in self._planner.live.values())}


def ending(store: "AdapterStore") -> dict[str, str]:
    """The adapters whose unloading was answered → version."""
    return {name: known.version for name, known in store.known.items() if name in store.ending}


def read(store: "AdapterStore", known: "Known") -> "Read":
    """What the file of an adapter has now; an error as a refusal."""
    try:
        return store.read_known(known)
    except (StartupError, OSError) as error:
        raise CommandRefused(str(error)) from error
