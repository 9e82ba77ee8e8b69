"""Compiles grammars beside the scheduler's loop, so that one hostile grammar delays no innocent one.

    GrammarPool.submit ──► FairQueue ──► a worker thread and its checking process ──► GrammarPool.ready()

Every grammar gets a short first turn, in which nearly all are done; those that are not wait for a second turn. One
worker prefers first turns, another second ones, and each takes what there is. Within both, calls take turns: a call
that brings a thousand grammars waits for itself.
"""

import logging
import os
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from quartet.runtime import limits
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.process.guarded import Guarded
from quartet.scheduler_service.grammar.matchers import Grammar, GrammarCompiler, TakesLong, checker

log = logging.getLogger(__name__)

NICE = 5  # below the steps


@dataclass(slots=True, eq=False)
class Waiting:
    """One request's grammar."""

    rid: str
    kind: str
    text: str
    call: str  # the client's call that the request belongs to
    patient: bool = False  # its first turn is over
    cancelled: bool = False


class FairQueue:
    """What waits, first and second turns apart, each by call. Not safe for threads."""

    def __init__(self) -> None:
        self._turns: tuple[OrderedDict[str, deque[Waiting]], ...] = (OrderedDict(), OrderedDict())

    def put(self, waiting: Waiting) -> None:
        self._turns[waiting.patient].setdefault(waiting.call, deque()).append(waiting)

    def take(self, prefers_patient: bool) -> Waiting | None:
        """The next of the preferred turn, else of the other; the call it belongs to goes to the end."""
        for turn in (self._turns[prefers_patient], self._turns[not prefers_patient]):
            while turn:
                call, queued = turn.popitem(last=False)
                waiting = queued.popleft()
                if queued:
                    turn[call] = queued
                if not waiting.cancelled:
                    return waiting
        return None


class GrammarPool:
    """The loop hands grammars in and asks `ready` once a step; threads do the work."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        workers: int = limits.GRAMMAR_WORKERS,
        new_checker: Callable[[], Guarded] = checker,
    ) -> None:
        self._compiler = compiler
        self._queue = FairQueue()
        self._waiting: dict[str, Waiting] = {}
        self._running: dict[Waiting, Guarded] = {}
        self._done: list[tuple[Waiting, Grammar | RequestError]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._checkers = [new_checker() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._work, args=(number, own), name=f"grammar-{number}", daemon=True)
            for number, own in enumerate(self._checkers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait for their grammar; the loop must not block for long while there are any."""
        return len(self._waiting)

    def warm(self) -> None:
        """Load what the first grammar would otherwise wait for."""
        with self._changed:
            self._queue.put(Waiting(rid="", kind="regex", text="a", call=""))
            self._changed.notify()

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        """Start to compile a request's grammar. `call`: what it shares its turns with; by default it is alone."""
        waiting = Waiting(rid, kind, text, call or rid)
        with self._changed:
            self._waiting[rid] = waiting
            self._queue.put(waiting)
            self._changed.notify()

    def cancel(self, rid: str) -> None:
        """Forget a request that was aborted, and end the work for it; unknown ones are ignored."""
        with self._changed:
            waiting = self._waiting.pop(rid, None)
            if waiting is None:
                return
            waiting.cancelled, waiting.text = True, ""
            if (busy := self._running.get(waiting)) is not None:
                busy.end()

    def ready(self) -> list[tuple[str, Grammar | RequestError]]:
        """The requests whose grammar was decided since the last call, each with it or with its refusal."""
        with self._changed:
            done, self._done = self._done, []
            mine = [(waiting, outcome) for waiting, outcome in done if self._waiting.get(waiting.rid) is waiting]
            for waiting, _ in mine:
                del self._waiting[waiting.rid]
        return [(waiting.rid, outcome) for waiting, outcome in mine]

    def close(self) -> None:
        """End all threads and their processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for own in self._checkers:
            own.end()
        for thread in self._threads:
            thread.join()
        for own in self._checkers:
            own.close()
        self._compiler.close()

    # in the threads

    def _work(self, number: int, own: Guarded) -> None:
        """Until the pool is closed. The checking process dies with this thread (runtime/process/parent_death.py)."""
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)
        while (waiting := self._take(bool(number % 2), own)) is not None:
            outcome = self._outcome(waiting, own)
            with self._changed:
                del self._running[waiting]
                if waiting.cancelled:
                    continue
                if outcome is None:
                    waiting.patient = True
                    self._queue.put(waiting)
                    self._changed.notify()
                else:
                    self._done.append((waiting, outcome))

    def _take(self, prefers_patient: bool, own: Guarded) -> Waiting | None:
        with self._changed:
            while not self._closed:
                if (waiting := self._queue.take(prefers_patient)) is not None:
                    self._running[waiting] = own
                    return waiting
                self._changed.wait()
        return None

    def _outcome(self, waiting: Waiting, own: Guarded) -> Grammar | RequestError | None:
        """The grammar or its refusal; None: it needs a second turn."""
        try:
            return self._compiler.attempt(waiting.kind, waiting.text, own, patient=waiting.patient)
        except TakesLong:
            return None
        except RequestError as error:
            return error
        except Exception:
            log.exception("a grammar could not be compiled, for a reason that is not its own")
            return RequestError("The grammar could not be compiled.", Kind.INTERNAL)
