"""Decides what the scheduler does next: a pure state machine over requests, pages and slots.

    add ──► waiting ──admit──► running (prefill, then decode) ──► released
               ▲                   │
               └─────retracted─────┘

`next` turns the state into a Plan, and `apply` turns the plan's results into Updates. There may be several plans in
flight: launched, and their results not applied yet. So a finish only marks a sequence; `_remove` alone takes it out,
once no plan in flight names it. No clock, no tensors, no sockets.
"""

import logging
from collections.abc import Collection

from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import ABORTED, ABORTED_IN_QUEUE, Drafts, Finish, Tokenized
from quartet.scheduler_service.core import outcome, rules
from quartet.scheduler_service.core.adapter_limit import AdapterLimit
from quartet.scheduler_service.core.deadlines import Deadlines
from quartet.scheduler_service.core.drafts import Grammar
from quartet.scheduler_service.core.page_pool import Admission, empty_pool
from quartet.scheduler_service.core.plan import Plan, Result, Slice, Update
from quartet.scheduler_service.core.policy import ORDERS, GrowthEstimate, proposed_drafts, retraction_order
from quartet.scheduler_service.core.preemption import choose_victims, preemptible
from quartet.scheduler_service.core.queue import WaitingQueue
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT
from quartet.scheduler_service.core.stats import Stats

log = logging.getLogger(__name__)

MIN_PREFILL_SHARE = 4  # decode rows leave at least 1/4 of a step's tokens to prefill


class Planner:
    """Holds every request from its arrival in the scheduler until its last page is free again."""

    def __init__(self, config: PlannerConfig) -> None:
        self.config = config
        self.pool = empty_pool(self.config)
        self.order = ORDERS[config.policy]
        self.growth = GrowthEstimate()
        self.deadlines = Deadlines(config.waiting_timeout_s, config.running_timeout_s)
        self.stats = Stats()
        self.waiting = WaitingQueue(config.max_queued, by_priority=config.policy == "priority")
        self.running: dict[Sequence, None] = {}  # in order of admission; finished ones too while in flight
        self.adapters = AdapterLimit(config.max_adapters, self.running, self.waiting)
        self.live: dict[str, Sequence] = {}  # rid → sequence without a finish
        self.slots = list(range(config.max_running - 1, -1, -1))  # free ones
        self.released: list[Sequence] = []  # the worker shall forget their state; emptied by the scheduler
        self.paused = False  # plan nothing; requests stay where they are
        self.asleep = False  # the same, because memory is released or its contents are lost

    @property
    def idle(self) -> bool:
        return not (self.running or self.waiting)

    @property
    def busy(self) -> bool:
        """Whether `next` may give a plan."""
        return not (self.paused or self.asleep or self.idle)

    @property
    def prefills_next(self) -> bool:
        """Whether the next plan will probably compute prompts."""
        return bool(self.waiting and self.slots) or any(sequence.needs_prefill for sequence in self.running)

    # requests: add, abort, time limits

    def add(self, message: Tokenized, now: float, grammar: Grammar | None = None) -> list[Update]:
        """Queue a request. Raises RequestError when it cannot be served; may end another one that it displaces."""
        rid, attempt = message.request.rid, message.request.attempt
        rival = self.live.get(rid)
        if rival and attempt <= rival.request.attempt:
            log.warning("ignored a duplicate of request %s (attempt %d)", rid, attempt)
            return []
        sequence = rules.sequence_of(message, self.config, now, grammar)
        self.waiting.number(sequence)
        updates = self._enforce_queue_limit(sequence) + self.abort(rid)
        self.stats.requests += 1
        self.live[rid] = sequence
        self.deadlines.start(sequence)
        self.waiting.put(sequence)
        if sequence.output_len and (finish := rules.finish_after_last(sequence)):
            updates.append(self._finish(sequence, finish))
        return updates

    def _enforce_queue_limit(self, newcomer: Sequence) -> list[Update]:
        """End the request that the full queue has no space for; raises RequestError where that is the newcomer."""
        if newcomer.request.again:  # it was within the limit the first time
            return []
        refused = self.waiting.overflow(newcomer, len(self.slots))
        if refused is None:
            return []
        self.stats.refused += 1
        full = RequestError("The request queue is full.", Kind.UNAVAILABLE)
        if refused is newcomer:
            raise full
        return [self._finish(refused, Finish.failed(full))]

    def abort(self, rid: str, message: str = "") -> list[Update]:
        """End one request, waiting or running, as aborted; unknown and finished ones are ignored."""
        sequence = self.live.get(rid)
        if sequence is None:
            return []
        queued = sequence in self.waiting and not sequence.update_sent
        self.stats.aborted += 1
        reason = message or (ABORTED_IN_QUEUE if queued else ABORTED)
        return self.end(rid, Finish(reason="abort", message=reason))

    def end(self, rid: str, finish: Finish) -> list[Update]:
        """End one request, waiting or running, for this reason."""
        sequence = self.live.get(rid)
        return [self._finish(sequence, finish)] if sequence else []

    def advance_clock(self, now: float) -> None:
        """Count the time up to `now` by the present state: call it before a change of state and before `add`."""
        self.deadlines.advance(now, self.paused or self.asleep)

    def expire(self, now: float) -> list[Update]:
        """End the requests that are over a time limit; call it at every turn of the loop."""
        self.advance_clock(now)
        expired = self.deadlines.expired(self.live.values())
        self.stats.aborted += len(expired)
        return [self._finish(sequence, Finish.failed(error)) for sequence, error in expired]

    # the next step

    def next(self, now: float) -> Plan | None:
        """The slices of one step: decode rows, then prefills that have begun, then requests that can be admitted.

        With drafts, the results of every step must have been applied before the next one is planned.
        """
        if not self.busy:
            return None
        plan = Plan(usage=self.pool.usage)
        if self.config.preemption_threshold is not None and self.waiting:
            self._preempt(self.config.preemption_threshold)
        rows = self._plan_decodes(plan)
        budget = self._plan_prefills(plan, self._prefill_budget(rows))
        if self.waiting and self.slots and budget > 0 and not plan.retracted:
            self._admit(plan, budget, now)
        return plan if plan.slices else None

    def _plan_decodes(self, plan: Plan) -> int:
        """One token for each sequence that can have a page for it, more where some are forced or drafted: how many."""
        rows = [s for s in self.running if s.needs_decode]
        growing = [s for s in rows if s.computed >= len(s.pages) * self.config.page_size]
        if len(growing) > self.pool.available:
            rows, growing = self._retract_for_growth(plan, rows, growing)
        self.pool.grow(growing)
        if rows:
            self.growth.decay()
        several: dict[Sequence, tuple[int, ...]] = {s: () for s in rows if len(s.ids) > s.computed + 1}
        if self.config.drafts:
            several |= self._drafts(rows, self.config.drafts.max_step_tokens - len(rows))
        slices, tokens = plan.slices, len(rows) - len(several)
        for sequence in [s for s in rows if s not in several] if several else rows:
            start = sequence.computed
            sequence.computed = start + 1
            sequence.in_flight += 1
            saves = self.pool.reserve_snapshots(sequence, start, start + 1) if self.config.snapshots else ()
            slices.append(Slice(sequence, start, start + 1, True, saves=saves))
        plan.decodes, plan.verifications = len(slices), len(several)
        for sequence, draft in several.items():
            start, end = sequence.computed, self.pool.extend(sequence, len(sequence.ids), len(self.running))
            sequence.computed = end + len(draft)
            sequence.in_flight += 1
            slices.append(Slice(sequence, start, sequence.computed, end == len(sequence.ids), drafts=draft))
            tokens += sequence.computed - start
        return tokens

    def _drafts(self, rows: list[Sequence], budget: int) -> dict[Sequence, tuple[int, ...]]:
        """The drafts that this step verifies. They take no page that a running request may need for its next token."""
        found = proposed_drafts(rows, budget)
        for sequence, draft in found.items():
            start = sequence.computed + 1
            found[sequence] = draft[: self.pool.extend(sequence, start + len(draft), len(self.running)) - start]
        return {sequence: draft for sequence, draft in found.items() if draft}

    def _prefill_budget(self, decodes: int) -> int:
        """Prompt tokens that this step may compute."""
        chunk = self.config.chunked_prefill_size
        if chunk < 0:
            return self.config.max_prefill_tokens
        return min(max(chunk - decodes, -(-chunk // MIN_PREFILL_SHARE)), self.config.max_prefill_tokens)

    def _plan_prefills(self, plan: Plan, budget: int) -> int:
        """Continue the prompts of admitted requests; returns what is left of the budget."""
        for sequence in [s for s in self.running if s.needs_prefill]:
            if budget <= 0:
                break
            budget -= self._plan_chunk(plan, sequence, budget)
        return budget

    def _plan_chunk(self, plan: Plan, sequence: Sequence, budget: int) -> int:
        """The next chunk of one prompt (the whole prompt where chunking is off); returns its length."""
        start, whole = sequence.computed, sequence.prefill_end
        end = whole if self.config.chunked_prefill_size < 0 else min(whole, start + budget)
        samples = end == whole and sequence.limit > 0
        part = Slice(sequence, start, end, samples, rules.score_from(sequence, start, end), restores=sequence.restores)
        part.saves = self.pool.reserve_snapshots(sequence, start, end)
        plan.slices.append(part)
        sequence.restores = NO_SNAPSHOT
        sequence.computed = end
        sequence.in_flight += 1
        return end - start

    def _admit(self, plan: Plan, budget: int, now: float) -> None:
        """Admit requests in the policy's order, as long as there are slots, pages and budget."""
        self.adapters.begin()
        for sequence in self.order(self.waiting, self.pool):
            if budget <= 0 or not self.slots:
                return
            if not self.adapters.may_start(sequence):
                continue
            spare = self._growth_pages(sequence, self.running)
            admission = self.pool.admit(sequence, rules.reusable_tokens(sequence), spare)
            if admission is Admission.NO_ROOM:
                return
            if admission is Admission.ADMITTED:
                self._start(plan, sequence, now)
                self.adapters.started(sequence)
                budget -= self._plan_chunk(plan, sequence, budget)

    def _start(self, plan: Plan, sequence: Sequence, now: float) -> None:
        """Move an admitted sequence from the queue to the running ones."""
        self.waiting.remove(sequence)
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
            sequence.queue_s = max(0.0, now - sequence.arrived_at)
            self.stats.queue_s += sequence.queue_s

    def _growth_pages(self, newcomer: Sequence, others: Collection[Sequence]) -> int:
        """Pages to leave free for the growth of the newcomer and the others; none if there are no others."""
        if not others:
            return 0
        tokens = self.growth.tokens(newcomer) + sum(map(self.growth.tokens, others))
        return int(tokens / self.config.page_size)

    # retraction: running requests go back to the queue, where they keep their output

    def _retract_for_growth(
        self, plan: Plan, rows: list[Sequence], growing: list[Sequence]
    ) -> tuple[list[Sequence], list[Sequence]]:
        """Retract as many requests as it takes for the others to grow. Returns the (rows, growing) of this step.

        Rows are left out of this step where their pages come back only with a step in flight.
        """
        victims = retraction_order(s for s in self.running if s.finish is None and not s.retracting)
        coming = sum(len(s.pages) for s in self.running if s.finish or s.retracting)  # with the steps in flight
        short = set(growing)
        for victim in victims:
            if len(short) <= self.pool.available + coming:
                break
            short.discard(victim)
            plan.retracted.append(victim)
            coming += len(victim.pages) if victim.in_flight else 0
            self._retract(victim)
        if plan.retracted:
            self.stats.retractions += len(plan.retracted)
            self.growth.penalise()
        grown = [s for s in growing if s in short][: self.pool.available]
        left_out = {s for s in growing if s not in set(grown)}.union(plan.retracted)
        return [s for s in rows if s not in left_out], grown

    def _preempt(self, threshold: int) -> None:
        """Retract requests of lower priority where the first of the queue could not be admitted otherwise."""
        first = min(self.waiting, key=lambda s: (-s.priority, s.serial))
        self.adapters.begin()
        if not self.adapters.has_room(first):
            return
        candidates = preemptible(first, self.running, threshold)
        missing = self.pool.missing(first, rules.reusable_tokens(first)) if candidates else None
        if missing is None:
            return
        victims = choose_victims(
            candidates, self.running, len(self.slots), missing, lambda staying: self._growth_pages(first, staying)
        )
        self.stats.preemptions += len(victims)
        for victim in victims:
            self._retract(victim)

    def retract_all(self) -> None:
        """Send everything that runs back to the queue, to be computed anew when it is admitted again."""
        for sequence in [s for s in self.running if s.finish is None and not s.retracting]:
            self._retract(sequence)

    def _retract(self, sequence: Sequence) -> None:
        """Send one request back to the queue with its output, now or when its steps in flight are applied."""
        sequence.retracting = True
        sequence.retractions += 1
        self._remove(sequence)

    # results

    def apply(self, plan: Plan, results: list[Result], now: float) -> list[Update]:
        """Apply a step's results, one per slice of its plan; those of a finished request are dropped."""
        updates = []
        for part, result in zip(plan.slices, results, strict=True):
            sequence = part.sequence
            sequence.in_flight -= 1
            self.pool.settle_snapshots(part, sequence.finish is None and not result.error)
            if sequence.finish is None and (update := self._apply_result(part, result)):
                updates.append(update)
            if sequence.finish or sequence.retracting:
                self._remove(sequence)
        return updates

    def _apply_result(self, part: Slice, result: Result) -> Update | None:
        """Append what was sampled and decide whether the request ends; None where there is nothing to send yet."""
        sequence = part.sequence
        if result.error:
            sequence.kv_invalid = True
            return self._mark_finished(sequence, rules.failure(result))
        if result.input_logprobs or result.hidden_states or result.routed_experts:
            outcome.store_extras(part, result)
        if part.end <= sequence.prefill_end:
            self.pool.cache(sequence, part.end)
        if result.tokens is None:
            prompt_done = part.end >= sequence.prefill_end and not sequence.limit  # scoring, or an embedding
            return self._mark_finished(sequence, Finish(reason="length", length=0), result) if prompt_done else None
        if part.drafts:
            finish = outcome.accept_draft(part, result, self.stats)
        else:
            finish = outcome.append_tokens(sequence, result)
        self.stats.generation_tokens += len(result.tokens)
        update = self._mark_finished(sequence, finish, result) if finish else outcome.update_of(sequence, result)
        if self.config.drafts and part.start >= sequence.prefill_end:
            update.drafts = Drafts(proposed=len(part.drafts), correct=len(result.tokens) - 1)
        return update

    def _mark_finished(self, sequence: Sequence, finish: Finish, result: Result | None = None) -> Update:
        """The last update of a request. The caller calls `_remove`."""
        sequence.finish = finish
        del self.live[sequence.rid]
        update = outcome.update_of(sequence, result or Result())
        update.finish = finish
        update.routed_experts = rules.routed_experts(sequence)
        return update

    def _finish(self, sequence: Sequence, finish: Finish) -> Update:
        """End a request while no result of it is being applied."""
        update = self._mark_finished(sequence, finish)
        self._remove(sequence)
        return update

    def _remove(self, sequence: Sequence) -> None:
        """Take a finished sequence out, or a retracted one back to the queue. Only here pages and slots become free."""
        if sequence.in_flight:  # a launched step may still read and write them
            return
        if sequence in self.waiting:
            self.waiting.remove(sequence)
        else:
            del self.running[sequence]
            self.pool.release(sequence, 0 if sequence.kv_invalid else min(sequence.computed, len(sequence.ids)))
            self.slots.append(sequence.slot)
            self.released.append(sequence)
        if sequence.finish is None:
            sequence.retracting = False
            sequence.computed = 0
            self.waiting.put(sequence)
        if not self.running:
            self.growth.reset()

    # the prefix cache, and checks

    def forget_prefixes(self, free: bool = True, keep_tier: bool = False) -> None:
        """Have no later request match KV computed so far (`keep_tier`: but the tier's); `free` the cached pages."""
        self.pool.forget(self.waiting.invalidate_prefixes(), free, keep_tier)

    def audit(self) -> str:
        """When idle: why the page counts do not add up, or "". Constant time; `check_invariants` checks everything."""
        fault = self.pool.imbalance()
        return fault or (f"{len(self.live)} requests are live" if self.live else "")

    def repair(self) -> None:
        """When idle: start with an empty pool and all slots free."""
        assert self.idle
        self.pool = empty_pool(self.config, self.pool.tier)
        self.slots = list(range(self.config.max_running - 1, -1, -1))
        self.live.clear()

    def check_invariants(self) -> None:
        """Assert that every page and every slot is in exactly one place."""
        self.pool.check_invariants(self.running)
        assert sorted([*self.slots, *(s.slot for s in self.running)]) == list(range(self.config.max_running)), (
            self.slots
        )
        assert self.live.keys() == {s.rid for s in [*self.waiting, *self.running] if not s.finish}
        assert not any(s.finish or s.in_flight or s.pages for s in self.waiting)
