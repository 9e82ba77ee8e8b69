"""Compiles grammars in background threads, so that one slow grammar does not delay the requests of others.

    GrammarPool.submit ──► FairQueue ──► a worker thread and its checking process ──► GrammarPool.ready()

What the compiler has in its cache is ready at once.

Every grammar gets a short first try, in which nearly all are compiled; the others wait for a second, long one. One
worker prefers first tries, another second ones, and each does the other kind when there is none. Within both kinds
the grammars of different calls alternate, so a call with a thousand grammars delays mostly itself.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable
from dataclasses import dataclass

from quartet.runtime import limits
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.process.guarded import Guarded
from quartet.runtime.process.priority import give_way
from quartet.scheduler_service.grammar.matchers import Grammar, GrammarCompiler, NeedsLongTry, new_checker

log = logging.getLogger(__name__)


@dataclass(slots=True, eq=False)
class Job:
    """One request's grammar, to be compiled."""

    rid: str
    kind: str
    text: str
    call: str  # the client's call that the request belongs to
    long: bool = False  # the first try is over
    cancelled: bool = False


class FairQueue:
    """Jobs in two groups, for first and for long tries, each by call. Not safe for threads."""

    def __init__(self) -> None:
        self._groups: tuple[OrderedDict[str, deque[Job]], ...] = (OrderedDict(), OrderedDict())

    def put(self, job: Job) -> None:
        self._groups[job.long].setdefault(job.call, deque()).append(job)

    def take(self, prefer_long: bool) -> Job | None:
        """The next job of the preferred group, else of the other; its call moves to the end."""
        for group in (self._groups[prefer_long], self._groups[not prefer_long]):
            while group:
                call, jobs = group.popitem(last=False)
                job = jobs.popleft()
                if jobs:
                    group[call] = jobs
                if not job.cancelled:
                    return job
        return None


class GrammarPool:
    """The loop submits grammars and asks `ready` once a step; threads do the work."""

    def __init__(
        self,
        compiler: GrammarCompiler,
        workers: int = limits.GRAMMAR_WORKERS,
        new_checker: Callable[[], Guarded] = new_checker,
    ) -> None:
        """`new_checker` makes the checking process of one worker."""
        self._compiler = compiler
        self._queue = FairQueue()
        self._jobs: dict[str, Job] = {}  # by rid, neither taken with `ready` nor cancelled
        self._running: dict[Job, Guarded] = {}
        self._done: list[tuple[Job, Grammar | RequestError]] = []
        self._changed = threading.Condition()
        self._closed = False
        self._checkers = [new_checker() for _ in range(workers)]
        self._threads = [
            threading.Thread(target=self._work, args=(number, checker), name=f"grammar-{number}", daemon=True)
            for number, checker in enumerate(self._checkers)
        ]
        for thread in self._threads:
            thread.start()

    @property
    def pending(self) -> int:
        """Requests that wait for their grammar; the loop must not block for long while there are any."""
        return len(self._jobs)

    def warm(self) -> None:
        """Load what the first grammar would otherwise wait for."""
        with self._changed:
            self._queue.put(Job(rid="", kind="regex", text="a", call=""))
            self._changed.notify()

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        """Start to compile a request's grammar. `call`: the client's call; by default the request is its own."""
        job = Job(rid, kind, text, call or rid)
        known = self._compiler.known(kind, text)
        with self._changed:
            self._jobs[rid] = job
            if known is not None:
                self._done.append((job, known))
                return
            self._queue.put(job)
            self._changed.notify()

    def cancel(self, rid: str) -> None:
        """Forget a request that was aborted, and end the work for it; unknown ones are ignored."""
        with self._changed:
            job = self._jobs.pop(rid, None)
            if job is None:
                return
            job.cancelled, job.text = True, ""
            if (checker := self._running.get(job)) is not None:
                checker.end()

    def ready(self) -> list[tuple[str, Grammar | RequestError]]:
        """The requests whose grammar was compiled or refused since the last call, with it or with the refusal."""
        with self._changed:
            done, self._done = self._done, []
            current = [(job, outcome) for job, outcome in done if self._jobs.get(job.rid) is job]
            for job, _ in current:
                del self._jobs[job.rid]
        return [(job.rid, outcome) for job, outcome in current]

    def close(self) -> None:
        """End all threads and their processes."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        for checker in self._checkers:
            checker.end()
        for thread in self._threads:
            thread.join()
        for checker in self._checkers:
            checker.close()
        self._compiler.close()

    # in the threads

    def _work(self, number: int, checker: Guarded) -> None:
        """Until the pool is closed. The checking process dies with this thread (runtime/process/parent_death.py)."""
        give_way()
        while (job := self._take(bool(number % 2), checker)) is not None:
            outcome = self._compile(job, checker)
            with self._changed:
                del self._running[job]
                if job.cancelled:
                    continue
                if outcome is None:
                    job.long = True
                    self._queue.put(job)
                    self._changed.notify()
                else:
                    self._done.append((job, outcome))

    def _take(self, prefer_long: bool, checker: Guarded) -> Job | None:
        with self._changed:
            while not self._closed:
                if (job := self._queue.take(prefer_long)) is not None:
                    self._running[job] = checker
                    return job
                self._changed.wait()
        return None

    def _compile(self, job: Job, checker: Guarded) -> Grammar | RequestError | None:
        """The grammar or its refusal; None: it needs a long try."""
        try:
            return self._compiler.try_compile(job.kind, job.text, checker, long=job.long)
        except NeedsLongTry:
            return None
        except RequestError as error:
            return error
        except Exception:
            log.exception("a grammar could not be compiled, because of an error in this server")
            return RequestError("The grammar could not be compiled.", Kind.INTERNAL)
