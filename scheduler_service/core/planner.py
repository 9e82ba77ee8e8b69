"""What the scheduler does next: a pure state machine over requests, pages and slots. No clock, no tensors, no sockets.

    add ──► waiting ──admit──► running (prefill, then decode) ──► released
               ▲                   │
               └─────retracted─────┘

A finish is only a mark. `_settle` alone takes a sequence out, when nothing of it is in flight. Everything else reads
as: `next` turns state into a Plan, `apply` turns the Plan's results into Updates.
"""

import logging
from collections.abc import Collection

from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import ABORTED, ABORTED_IN_QUEUE, Drafts, Finish, Tokenized
from quartet.scheduler_service.core import outcome, rules
from quartet.scheduler_service.core.deadlines import Deadlines
from quartet.scheduler_service.core.memory import Memory, Verdict
from quartet.scheduler_service.core.plan import Plan, Result, Slice, Update
from quartet.scheduler_service.core.policy import ORDERS, Growth, proposed_drafts, retraction_order
from quartet.scheduler_service.core.preemption import lesser, victims
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.core.stats import Stats

log = logging.getLogger(__name__)

LEAST_PREFILL_SHARE = 4  # decode rows leave at least 1/4 of a step's tokens to prefill


class Planner:
    """Holds every request from its arrival in the scheduler until its last page is back."""

    def __init__(self, config: PlannerConfig) -> None:
        self.config = config
        self.memory = Memory(config.page_size, config.total_pages, config.reuse_prefixes)
        self.order = ORDERS[config.policy]
        self.growth = Growth()
        self.deadlines = Deadlines(config.waiting_timeout_s, config.running_timeout_s)
        self.stats = Stats()
        self.waiting: dict[Sequence, None] = {}
        self.running: dict[Sequence, None] = {}  # in order of admission; finished ones too while in flight
        self.live: dict[str, Sequence] = {}  # rid → sequence without a finish
        self.slots = list(range(config.max_running - 1, -1, -1))
        self.released: list[Sequence] = []  # their worker state is to be forgotten; drained by the scheduler
        self.paused = False  # plan nothing; requests stay where they are
        self.asleep = False  # likewise, because memory is given up or its contents are
        self.generation = 0  # part of the prefix namespace: raised when cached KV is no longer what the model gives
        self._arrivals = 0

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    @property
    def busy(self) -> bool:
        """Whether `next` may give a plan."""
        return not (self.paused or self.asleep or self.idle)

    @property
    def prefills_next(self) -> bool:
        """Whether the next plan has prompts to compute, as far as can be said before it is made."""
        return bool(self.waiting and self.slots) or any(sequence.wants_prefill for sequence in self.running)

    # requests in

    def add(self, message: Tokenized, now: float, grammar: object | None = None) -> list[Update]:
        """Queue a request. Raises RequestError when it cannot be served; may end another that it displaces."""
        rid, attempt = message.request.rid, message.request.attempt
        rival = self.live.get(rid)
        if rival and attempt <= rival.request.attempt:
            log.warning("ignored a duplicate of request %s (attempt %d)", rid, attempt)
            return []
        sequence = rules.sequence_of(message, self.config, now)
        sequence.grammar = grammar
        self._arrivals += 1
        sequence.serial = self._arrivals
        updates = [] if message.request.again else self._make_place(sequence)  # one that comes again had its place
        updates += self.abort(rid)
        self.stats.requests += 1
        self.live[rid] = sequence
        self.deadlines.start(sequence)
        self._queue(sequence)
        if sequence.output_len and (finish := rules.finish_after_last(sequence)):
            updates.append(self._end_now(sequence, finish))
        return updates

    def abort(self, rid: str, message: str = "") -> list[Update]:
        """End one request wherever it is; unknown and finished ones are left alone."""
        sequence = self.live.get(rid)
        if sequence is None:
            return []
        queued = sequence in self.waiting and not sequence.opened
        self.stats.aborted += 1
        reason = message or (ABORTED_IN_QUEUE if queued else ABORTED)
        return self.end(rid, Finish(reason="abort", message=reason))

    def end(self, rid: str, finish: Finish) -> list[Update]:
        """End one request wherever it is, for this reason."""
        sequence = self.live.get(rid)
        return [self._end_now(sequence, finish)] if sequence else []

    def tell_time(self, now: float) -> None:
        """Time has passed up to now, in this state: call it before anything that changes it or starts a limit."""
        self.deadlines.tick(now, self.paused or self.asleep)

    def expire(self, now: float) -> list[Update]:
        """End who has waited or run for too long; call it at every turn of the loop."""
        self.tell_time(now)
        late = self.deadlines.late(self.live.values())
        self.stats.aborted += len(late)
        return [self._end_now(sequence, Finish.failed(error)) for sequence, error in late]

    def _queue(self, sequence: Sequence) -> None:
        self.waiting[sequence] = None
        sequence.namespace = f"{self.generation}/{sequence.request.extra_key}"

    def _make_place(self, newcomer: Sequence) -> list[Update]:
        """Hold the queue limit, by refusing the newcomer or, under the priority policy, a lesser one that waits."""
        limit = self.config.max_queued
        if limit is None or len(self.waiting) - len(self.slots) < limit:
            return []
        full = RequestError("The request queue is full.", Kind.UNAVAILABLE)
        self.stats.refused += 1
        if self.config.policy == "priority":
            last = min(self.waiting, key=lambda s: (s.priority, -s.serial))
            admitted = last.opened or last.request.again
            if last.priority < newcomer.priority and not admitted:
                return [self._end_now(last, Finish.failed(full))]
        raise full

    # the next step

    def next(self, now: float) -> Plan | None:
        """The slices of one step: decode rows, then prefill under way, then whoever can be admitted.

        With drafts every step's results must have been applied before the next one is planned.
        """
        if not self.busy:
            return None
        plan = Plan(usage=self.memory.usage)
        if self.config.preemption_threshold is not None and self.waiting:
            self._preempt(self.config.preemption_threshold)
        rows = self._plan_decodes(plan)
        budget = self._plan_prefills(plan, self._prefill_budget(rows))
        if self.waiting and self.slots and budget > 0 and not plan.retracted:
            self._admit(plan, budget, now)
        return plan if plan.slices else None

    def _plan_decodes(self, plan: Plan) -> int:
        """One token of each that can have its page, more where there is a draft; returns how many are computed."""
        rows = [s for s in self.running if s.wants_decode]
        page_size = self.config.page_size
        growing = [s for s in rows if s.computed >= len(s.pages) * page_size]
        if len(growing) > self.memory.available:
            rows, growing = self._retract(plan, rows, growing)
        self.memory.grow(growing)
        if rows:
            self.growth.decay()
        drafted = self._drafts(rows, self.config.drafts.rows - len(rows)) if self.config.drafts else {}
        slices = plan.slices
        for sequence in [s for s in rows if s not in drafted] if drafted else rows:
            start = sequence.computed
            sequence.computed = start + 1
            sequence.in_flight += 1
            slices.append(Slice(sequence, start, start + 1, True))
        plan.decodes, plan.verifications = len(slices), len(drafted)
        for sequence, draft in drafted.items():
            start = sequence.computed
            sequence.computed = start + 1 + len(draft)
            sequence.in_flight += 1
            slices.append(Slice(sequence, start, sequence.computed, True, drafts=draft))
        return len(rows) + sum(map(len, drafted.values()))

    def _drafts(self, rows: list[Sequence], budget: int) -> dict[Sequence, tuple[int, ...]]:
        """The drafts that a step verifies. A page that somebody needs for the next token is not taken for one."""
        found = proposed_drafts(rows, budget)
        for sequence, draft in found.items():
            start = sequence.computed + 1
            found[sequence] = draft[: self.memory.reach(sequence, start + len(draft), len(self.running)) - start]
        return {sequence: draft for sequence, draft in found.items() if draft}

    def _retract(
        self, plan: Plan, rows: list[Sequence], growing: list[Sequence]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Send back as many as it takes for the rest to grow; those that must wait for pages in flight sit out.

        Returns (rows, growing) without the ones that sit out or went.
        """
        victims = retraction_order(s for s in self.running if s.finish is None and not s.leaving)
        coming = sum(len(s.pages) for s in self.running if s.finish or s.leaving)  # once their step is back
        short = set(growing)
        for victim in victims:
            if len(short) <= self.memory.available + coming:
                break
            short.discard(victim)
            plan.retracted.append(victim)
            coming += len(victim.pages) if victim.in_flight else 0
            self._send_back(victim)
        if plan.retracted:
            self.stats.retractions += len(plan.retracted)
            self.growth.penalise()
        grown = [s for s in growing if s in short][: self.memory.available]
        out = {s for s in growing if s not in set(grown)}.union(plan.retracted)
        return [s for s in rows if s not in out], grown

    def _preempt(self, threshold: int) -> None:
        """Send requests of lower priority back where the first of the queue has no room without that."""
        first = min(self.waiting, key=lambda s: (-s.priority, s.serial))
        candidates = lesser(first, self.running, threshold)
        missing = self.memory.missing(first, rules.reusable_tokens(first)) if candidates else None
        if missing is None:
            return
        chosen = victims(
            candidates, self.running, len(self.slots), missing, lambda staying: self._growth_pages(first, staying)
        )
        self.stats.preemptions += len(chosen)
        for victim in chosen:
            self._send_back(victim)

    def _send_back(self, sequence: Sequence) -> None:
        """Back to the queue with its output, at once or when its step is back."""
        sequence.leaving = True
        sequence.retractions += 1
        self._settle(sequence)

    def retract_all(self) -> None:
        """Send everything that runs back to the queue, to be computed anew when it is admitted again."""
        for sequence in [s for s in self.running if s.finish is None and not s.leaving]:
            self._send_back(sequence)

    def _prefill_budget(self, decodes: int) -> int:
        """Prompt tokens that this step may compute."""
        chunk = self.config.chunked_prefill_size
        if chunk < 0:
            return self.config.max_prefill_tokens
        return min(max(chunk - decodes, -(-chunk // LEAST_PREFILL_SHARE)), self.config.max_prefill_tokens)

    def _plan_prefills(self, plan: Plan, budget: int) -> int:
        """Go on with admitted prompts; returns what is left of the budget."""
        for sequence in [s for s in self.running if s.wants_prefill]:
            if budget <= 0:
                break
            budget -= self._plan_chunk(plan, sequence, budget)
        return budget

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """The next chunk of one prompt (the whole prompt where chunking is off); returns its length."""
        start, whole = sequence.computed, sequence.prefill_end
        end = whole if self.config.chunked_prefill_size < 0 else min(whole, start + budget)
        samples = end == whole and sequence.limit > 0
        plan.slices.append(Slice(sequence, start, end, samples, rules.score_from(sequence, start, end)))
        sequence.computed = end
        sequence.in_flight += 1
        return end - start

    def _admit(self, plan: Plan, budget: int, now: float) -> None:
        """Let requests in, in the policy's order, as long as slots, pages and budget last."""
        for sequence in self.order(self.waiting, self.memory):
            if budget <= 0 or not self.slots:
                return
            verdict = self.memory.admit(
                sequence, rules.reusable_tokens(sequence), self._growth_pages(sequence, self.running)
            )
            if verdict is Verdict.NO_ROOM:
                return
            if verdict is Verdict.ADMITTED:
                self._start(plan, sequence, now)
                budget -= self._plan_chunk(plan, sequence, budget)

    def _start(self, plan: Plan, sequence: Sequence, now: float) -> None:
        """Bookkeeping of an admission."""
        del self.waiting[sequence]
        self.running[sequence] = None
        sequence.slot = self.slots.pop()
        sequence.prefill_end = len(sequence.ids)
        plan.cached_tokens += sequence.computed
        if not sequence.started:
            sequence.started = True
            self.deadlines.start(sequence)
            sequence.cached_tokens = min(sequence.computed, sequence.prompt_len)
            self.stats.prompt_tokens += sequence.prompt_len
            self.stats.cached_tokens += sequence.cached_tokens
            self.stats.queue_s += now - sequence.arrived_at

    def _growth_pages(self, newcomer: Sequence, others: Collection[Sequence]) -> int:
        """Pages to leave for the growth of the newcomer and of the others; none when it would be alone."""
        if not others:
            return 0
        tokens = self.growth.tokens(newcomer) + sum(map(self.growth.tokens, others))
        return int(tokens / self.config.page_size)

    # results

    def apply(self, plan: Plan, results: list[Result], now: float) -> list[Update]:
        """Take in what a step gave; what comes for a request that has ended is dropped."""
        updates = []
        for part, result in zip(plan.slices, results, strict=True):
            sequence = part.sequence
            sequence.in_flight -= 1
            if sequence.finish is None and (update := self._take_in(part, result)):
                updates.append(update)
            if sequence.finish or sequence.leaving:
                self._settle(sequence)
        return updates

    def _take_in(self, part: Slice, result: Result) -> Update | None:
        sequence = part.sequence
        if result.error:
            sequence.poisoned = True
            return self._end(sequence, rules.failure(result))
        outcome.keep_scores(part, result)
        if part.end <= sequence.prefill_end:
            self.memory.keep(sequence, part.end)
        if result.tokens is None:
            prompt_done = part.end >= sequence.prefill_end  # and no output is wanted: scoring or an embedding
            return self._end(sequence, Finish(reason="length", length=0), result) if prompt_done else None
        if part.drafts:
            finish = outcome.accept(part, result, self.stats)
        else:
            sequence.ids.append(result.tokens[0])
            finish = rules.finish_after_last(sequence, result.complete)
        self.stats.generation_tokens += len(result.tokens)
        update = self._end(sequence, finish, result) if finish else outcome.update_of(sequence, result)
        if self.config.drafts and part.start >= sequence.prefill_end:
            update.drafts = Drafts(proposed=len(part.drafts), correct=len(result.tokens) - 1)
        return update

    def _end(self, sequence: Sequence, finish: Finish, result: Result | None = None) -> Update:
        """Mark the end and say so, once; whoever calls settles."""
        sequence.finish = finish
        del self.live[sequence.rid]
        update = outcome.update_of(sequence, result or Result())
        update.finish = finish
        update.routed_experts = rules.routed_experts(sequence)
        return update

    def _end_now(self, sequence: Sequence, finish: Finish) -> Update:
        """End a sequence that no result is being taken in for."""
        update = self._end(sequence, finish)
        self._settle(sequence)
        return update

    # the one way out

    def _settle(self, sequence: Sequence) -> None:
        """Take out a sequence that is finished (it is retired) or leaving (back to the queue), once it has landed.

        The only place where pages and slots come back: as long as a launched step names them, they stay.
        """
        if sequence.in_flight:
            return
        if sequence in self.waiting:
            del self.waiting[sequence]
        else:
            del self.running[sequence]
            self.memory.release(sequence, 0 if sequence.poisoned else min(sequence.computed, len(sequence.ids)))
            self.slots.append(sequence.slot)
            self.released.append(sequence)
        if sequence.finish is None:
            sequence.leaving = False
            sequence.computed = 0
            self._queue(sequence)
        if not self.running:
            self.growth.rest()

    # care

    def forget_prefixes(self, free: bool = True) -> None:
        """See to it that nothing computed so far is matched by whoever comes later; `free` its pages at once."""
        self.generation += 1
        if free:
            self.memory.clear()
        for sequence in self.waiting:
            self._queue(sequence)

    def audit(self) -> str:
        """When idle: what is wrong with the books, or "". Constant time; `check` is the thorough one."""
        pages, tree = self.memory.pages, self.memory.tree
        if pages.free + tree.cached == pages.total and tree.cached == tree.evictable and not self.live:
            return ""
        return f"free {pages.free} + cached {tree.cached} (pinned {tree.cached - tree.evictable}) of {pages.total}"

    def repair(self) -> None:
        """Start the books afresh; only when idle, since nothing is kept."""
        assert self.idle
        self.memory = Memory(self.config.page_size, self.config.total_pages, self.config.reuse_prefixes)
        self.slots = list(range(self.config.max_running - 1, -1, -1))
        self.live.clear()

    def check(self) -> None:
        """Assert that every page and every slot is in exactly one place."""
        self.memory.check(self.running)
        slots = [*self.slots, *(s.slot for s in self.running)]
        assert sorted(slots) == list(range(self.config.max_running)), slots
        assert self.live.keys() == {s.rid for s in [*self.waiting, *self.running] if not s.finish}
        assert not any(s.finish or s.in_flight or s.pages for s in self.waiting)
