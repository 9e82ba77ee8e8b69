"""Requests that wait for their adapter: in order, read in the background, and never kept out."""

import threading
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest

from quartet.runtime.errors import Kind, RequestError, StartupError
from quartet.runtime.messages import Request, Tokenized, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.control.adapter_queue import AdapterQueue
from quartet.scheduler_service.core.deadlines import WAITED, Deadlines
from quartet.scheduler_service.host.background import run_in_background, yield_point

PATIENCE_S = 120.0


@dataclass
class Known:
    name: str
    pinned: bool = False
    version: str = "1"


@dataclass
class Store:
    """What the queue asks of the adapters: `most` of them in memory. A file is read when `gate` is open."""

    most: int
    known: dict[str, Known]
    loaded: list[str] = field(default_factory=list)
    ending: set[str] = field(default_factory=set)
    leaving: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    reads: list[str] = field(default_factory=list)
    threads: set[int] = field(default_factory=set)
    gate: threading.Event = field(default_factory=threading.Event)

    def is_served(self, name: str) -> bool:
        return name in self.known and name not in self.ending | self.leaving

    def state(self) -> list[str]:
        return [name for name in self.known if self.is_served(name)]

    def use(self, name: str) -> bool:
        return name in self.loaded

    def has_room(self) -> bool:
        return len(self.loaded) < self.most

    @property
    def all_pinned(self) -> bool:
        return all(self.known[name].pinned for name in self.loaded)

    def evict_unused(self, in_use: set[str]) -> bool:
        victim = next((name for name in self.loaded if name not in in_use and not self.known[name].pinned), None)
        if victim is not None:
            self.loaded.remove(victim)
        return victim is not None

    def in_background(self, work: Callable[[], str]) -> Generator[None, bool | None, str]:
        return run_in_background(work)

    def read_known(self, known: Known) -> str:
        self.reads.append(known.name)
        self.threads.add(threading.get_ident())
        self.gate.wait(PATIENCE_S)
        if known.name in self.broken:
            raise StartupError("it is torn")
        return known.name

    def bring_back(self, known: Known, read: str) -> None:
        self.loaded.append(read)

    def forget(self, name: str) -> None:
        self.ending.discard(name)
        self.loaded.remove(name)
        del self.known[name]


class Case:
    """A queue on a store with adapters a to d, of which some are in memory, and a planner that has some requests."""

    def __init__(self, *loaded: str, most: int = 1, ending: str = "") -> None:
        self.store = Store(most, {name: Known(name) for name in "abcd"}, list(loaded), set(ending))
        self.store.gate.set()
        self.live: dict[str, Any] = {}
        self.deadlines = Deadlines(waiting_s=5.0, running_s=None)
        planner: Any = SimpleNamespace(live=self.live, prefills_next=False, deadlines=self.deadlines)
        store: Any = self.store
        self.compiling: list[Request] = []  # wait for their grammar
        self.queue = AdapterQueue(store, planner, to_come=lambda: self.compiling)

    def put(self, rid: str, adapter: str, attempt: int = 0, again: bool = False) -> bool:
        request = Request(rid=rid, params=SamplingParams(), adapter=adapter, attempt=attempt, again=again)
        self.queue.check(request)
        return self.queue.takes(Tokenized(request=request, prompt_ids=pack_ids([1])), None)

    def runs(self, rid: str, adapter: str) -> None:
        """The planner has this request."""
        self.live[rid] = SimpleNamespace(request=SimpleNamespace(adapter=adapter))

    def turns(self, count: int = 1) -> list[tuple[str, Any]]:
        """Some turns of the loop; the requests that were taken, each admitted at once."""
        found = []
        for _ in range(count):
            for message, outcome in self.queue.take_ready():
                found.append((message.request.rid, outcome))
                if outcome is None:
                    self.runs(message.request.rid, message.request.adapter)
            time.sleep(0.001)
        return found

    def let_go(self, *names: str, version: str = "1") -> list[tuple[str, Any]]:
        """The gateway has no request that names these; some turns."""
        for name in names:
            self.queue.let_go(name, version)
        return self.turns(2)

    def until(self, count: int) -> list[tuple[str, Any]]:
        """Turns until so many were taken."""
        found: list[tuple[str, Any]] = []
        ends_at = time.monotonic() + PATIENCE_S
        while len(found) < count:
            assert time.monotonic() < ends_at, found
            found += self.turns()
        return found


def test_the_base_and_an_adapter_in_memory_do_not_wait() -> None:
    case = Case("a")
    assert not case.put("1", "") and not case.put("2", "a")
    assert not case.store.reads


def test_an_evicted_adapter_is_read_in_another_thread_once_for_all_that_wait() -> None:
    case = Case()
    case.store.gate.clear()
    assert case.put("1", "b") and case.put("2", "b")
    assert case.turns(20) == [] and not case.put("3", "")
    case.store.gate.set()
    assert case.until(2) == [("1", None), ("2", None)]
    assert case.store.reads == ["b"] and threading.get_ident() not in case.store.threads


def test_an_adapter_takes_the_place_of_one_that_no_request_uses_any_more() -> None:
    case = Case("a")
    case.runs("old", "a")
    assert case.put("1", "b")
    assert case.turns(30) == [] and case.store.loaded == ["a"]
    del case.live["old"]
    assert case.until(1) == [("1", None)]
    assert case.store.loaded == ["b"]


def test_requests_for_an_adapter_in_memory_do_not_keep_an_earlier_one_out() -> None:
    case = Case("a")
    case.runs("old", "a")
    assert case.put("1", "b") and case.put("2", "a"), "it waits behind the first"
    assert case.turns(30) == []
    del case.live["old"]
    assert case.until(1) == [("1", None)]
    assert case.turns(10) == [], "a has to come back, and b is in use"
    del case.live["1"]
    assert case.until(1) == [("2", None)]


def test_an_adapter_that_cannot_be_read_ends_its_requests_and_evicts_nothing() -> None:
    case = Case("a")
    case.store.broken.add("b")
    case.put("1", "b")
    case.put("2", "a")
    [(rid, error), other] = case.until(2)
    assert (rid, other) == ("1", ("2", None)) and case.store.loaded == ["a"]
    assert isinstance(error, RequestError) and (error.kind, "it is torn" in error.message) == (Kind.UNAVAILABLE, True)


def test_nobody_waits_for_adapters_that_are_pinned() -> None:
    case = Case("a")
    case.store.known["a"].pinned = True
    case.put("1", "b")
    [(_, error)] = case.until(1)
    assert "all adapters in memory are pinned" in error.message and not case.store.reads


def test_an_adapter_that_was_replaced_while_it_was_read_is_not_served_as_it_was() -> None:
    case = Case()
    case.store.gate.clear()
    case.put("1", "b")
    case.turns(3)
    case.store.known["b"] = Known("b")
    case.store.loaded.append("b")
    case.store.gate.set()
    assert case.until(1) == [("1", None)]
    assert case.store.loaded == ["b"] and case.store.reads == ["b"]


def test_a_request_is_taken_out_and_a_later_attempt_replaces_it() -> None:
    case = Case("a")
    case.runs("old", "a")
    case.put("1", "b")
    case.put("1", "c", attempt=1)
    case.put("1", "d", attempt=0)
    assert [request.adapter for request in case.queue.requests] == ["c"]
    removed = case.queue.remove("1")
    assert removed is not None and not len(case.queue) and case.queue.remove("1") is None


def test_a_read_that_nobody_needs_any_more_ends_by_itself() -> None:
    case, ended = Case(), threading.Event()

    def read_known(known: Known) -> str:
        for _ in range(500):
            yield_point()
            time.sleep(0.001)
        ended.set()
        return known.name

    case.store.read_known = read_known  # type: ignore[method-assign]
    case.put("1", "b")
    assert case.turns(1) == []
    case.queue.remove("1")
    assert case.turns(1) == []
    assert ended.wait(PATIENCE_S) and not case.store.loaded


def test_names_that_are_not_served_are_refused() -> None:
    with pytest.raises(RequestError, match="never been loaded: x"):
        Case().put("1", "x")
    planner: Any = SimpleNamespace(live={}, prefills_next=False)
    with pytest.raises(RequestError, match="--enable-lora"):
        AdapterQueue(None, planner).check(Request(rid="1", params=SamplingParams(), adapter="a"))


def test_a_request_that_waits_for_too_long_ends_behind_one_that_may_wait():
    case = Case("a")
    case.runs("r0", "a")
    assert case.put("r1", "b")
    case.deadlines.advance(3.0, paused=False)
    assert case.put("r2", "c")
    case.deadlines.advance(6.0, paused=False)
    assert [(rid, error.message, error.kind) for rid, error in case.turns(3)] == [("r1", WAITED, Kind.UNAVAILABLE)]
    assert len(case.queue) == 1


def test_an_adapter_that_ends_is_forgotten_when_the_gateway_has_no_request_that_names_it() -> None:
    case = Case("a", "b", most=2)
    case.runs("old", "a")
    case.store.ending |= {"a", "b"}
    del case.live["old"]
    case.deadlines.advance(1e6, paused=False)
    assert case.turns(2) == [] and case.store.loaded == ["a", "b"]
    assert not case.put("old", "a", attempt=1, again=True), "it was held back by the gateway for a long time"
    case.runs("old", "a")
    assert case.let_go("b") == [] and case.store.loaded == ["a"]
    del case.live["old"]
    assert case.let_go("a") == [] and case.store.loaded == [] and [*case.store.known] == ["c", "d"]


def test_an_adapter_is_forgotten_behind_requests_that_the_gateway_has_given_up() -> None:
    case = Case("a", ending="a")
    case.runs("old", "a")
    assert case.let_go("a") == [] and case.store.loaded == ["a"]
    del case.live["old"]
    assert case.turns() == [] and not case.store.loaded


def test_an_adapter_that_was_loaded_again_is_not_forgotten_in_place_of_its_predecessor() -> None:
    case = Case("a", ending="a")
    case.runs("old", "a")
    case.let_go("a")
    case.store.ending.clear()
    case.store.known["a"].version = "2"
    assert case.turns() == []
    case.store.ending.add("a")
    del case.live["old"]
    assert case.turns() == [] and case.let_go("a") == [] and case.store.loaded == ["a"]
    assert case.let_go("a", version="2") == [] and case.store.loaded == []


def test_an_adapter_that_is_served_is_not_forgotten() -> None:
    case = Case("a")
    assert case.let_go("a", "x") == [] and case.store.loaded == ["a"]


def test_a_queue_tells_which_unloaded_adapters_it_keeps() -> None:
    case = Case("a", "b", most=2, ending="b")
    assert case.queue.state() == {"adapters": ["a", "c", "d"], "unloaded_adapters": {"b": "1"}}
    case.let_go("b")
    assert case.queue.state()["unloaded_adapters"] == {}


def test_an_adapter_that_ends_stays_for_requests_that_wait_for_it() -> None:
    case = Case("b")
    case.runs("old", "b")
    assert case.put("1", "a")
    case.store.ending.add("a")
    assert case.turns() == [] and "a" in case.store.known
    del case.live["old"]
    assert case.until(1) == [("1", None)] and "a" in case.store.known


def test_an_adapter_that_ends_stays_for_requests_whose_grammar_is_compiled() -> None:
    case = Case("a")
    case.compiling.append(Request(rid="1", params=SamplingParams(), adapter="a"))
    case.store.ending.add("a")
    assert case.let_go("a") == [] and case.store.loaded == ["a"]
    case.compiling.clear()
    assert case.let_go("a") == [] and case.store.loaded == []


def test_after_a_restart_an_adapter_that_ends_waits_for_the_requests_that_come_again() -> None:
    case = Case("a", ending="a")
    assert case.turns(2) == [] and case.store.loaded == ["a"]
    assert not case.put("old", "a", attempt=1, again=True)
    case.runs("old", "a")
    assert case.let_go("a") == [] and case.store.loaded == ["a"]
    del case.live["old"]
    assert case.let_go("a") == [] and case.store.loaded == []


@pytest.mark.parametrize("again", [False, True])
def test_a_request_that_comes_again_or_late_is_computed_with_an_adapter_that_was_unloaded(again: bool) -> None:
    case = Case("a")
    case.store.leaving.add("a")
    assert not case.put("1", "a", again=again)
    case.store.ending.add("a")
    assert not case.put("2", "a", again=again)
    case.let_go("a")
    with pytest.raises(RequestError, match="never been loaded: a"):
        case.put("3", "a", again=again)


def test_a_request_that_was_let_in_goes_on_with_an_adapter_that_is_unloaded_meanwhile() -> None:
    case = Case("a")
    request = Request(rid="1", params=SamplingParams(), adapter="a")
    case.queue.check(request)
    case.store.ending.add("a")
    assert not case.queue.takes(Tokenized(request=request, prompt_ids=pack_ids([1])), None)
