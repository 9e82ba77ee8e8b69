"""Launched steps, oldest first, and what happens to the requests of a step that fails."""

import logging
from collections import deque
from collections.abc import Iterator
from typing import Any, Protocol

from quartet.runtime.errors import Kind
from quartet.scheduler_service.core.plan import Plan, Result, Slice

log = logging.getLogger(__name__)

FAILED_BY_ITSELF = "The request could not be computed: {}: {}"
MOST_FAILURES = 8  # in a row, without a success between: then the process ends

Collected = tuple[Plan, list[Result]]


class StepWorker(Protocol):
    """The worker, as far as steps are concerned."""

    def launch(self, plan: Plan) -> Any:
        """Start one step; returns what `collect` takes."""
        ...

    def collect(self, pending: Any) -> list[Result]:
        """Wait for a step; one Result for each slice of its plan."""
        ...

    def reset(self) -> None:
        """After an exception: drop all that was launched and every state. Raises where the device itself has failed."""
        ...


class StepQueue:
    """Steps that were launched and not collected.

    The methods yield each step with its results; the caller applies them before it asks for the next, since a later
    step leaves out requests that an earlier one has ended. A step that raises is computed again request by request, so
    that only those requests fail that fail by themselves.
    """

    def __init__(self, worker: StepWorker) -> None:
        self._worker = worker
        self._launched: deque[tuple[Plan, Any]] = deque()
        self._failures = 0  # of single requests in a row, without a success between

    def __len__(self) -> int:
        return len(self._launched)

    def launch(self, plan: Plan) -> Iterator[Collected]:
        """Start a step. Yields nothing, unless it could not be started: then all that were launched, and this one."""
        try:
            pending = self._worker.launch(plan)
        except Exception as error:
            while self._launched:
                yield from self.collect_oldest()
            yield from self._retry_individually([plan], error)
        else:
            self._launched.append((plan, pending))

    def collect_oldest(self) -> Iterator[Collected]:
        """Wait for the oldest step. Where it failed, the later ones are retried too: their tokens came from it."""
        plan, pending = self._launched.popleft()
        try:
            results = self._worker.collect(pending)
        except Exception as error:
            later = [plan for plan, _ in self._launched]
            self._launched.clear()
            yield from self._retry_individually([plan, *later], error)
        else:
            self._failures = 0
            yield plan, results

    def _retry_individually(self, plans: list[Plan], error: Exception) -> Iterator[Collected]:
        """Compute failed steps again, request by request. Raises the error when nothing succeeds any more."""
        log.error("a step failed; its requests are tried one by one", exc_info=error)
        self._worker.reset()
        for plan in plans:
            results = [self._run_single(part, i < plan.decodes) for i, part in enumerate(plan.slices)]
            if self._failures >= MOST_FAILURES:
                raise error
            yield plan, results

    def _run_single(self, part: Slice, decode: bool) -> Result:
        """One slice of a failed step, in a step of its own."""
        if part.sequence.finish is not None:
            return Result()  # an earlier retry has ended the request
        try:
            plan = Plan([part], decodes=int(decode), verifications=int(bool(part.drafts)))
            (result,) = self._worker.collect(self._worker.launch(plan))
        except Exception as error:
            self._failures += 1
            log.exception("request %s failed", part.sequence.rid)
            self._worker.reset()
            return Result(error=FAILED_BY_ITSELF.format(type(error).__name__, error), error_kind=Kind.INTERNAL)
        self._failures = 0
        return result
