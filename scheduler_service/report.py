"""The scheduler's log lines and its counters for probes. Operators' tools parse the log lines: keep their wording."""

import logging
from dataclasses import dataclass
from typing import Any

from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.core.planner import Planner

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class DraftCounts:
    """Counts of speculative decoding over some decode steps."""

    rows: int = 0  # decode rows: one per request and step
    proposed: int = 0  # drafts
    correct: int = 0

    def since(self, before: "DraftCounts") -> "DraftCounts":
        return DraftCounts(self.rows - before.rows, self.proposed - before.proposed, self.correct - before.correct)

    @property
    def accept_length(self) -> float:
        """Mean tokens per request and decode step."""
        return 1 + self.correct / self.rows if self.rows else 0.0

    @property
    def accept_rate(self) -> float:
        return self.correct / self.proposed if self.proposed else 0.0


class Report:
    """Logs one line per prefill step and one per `interval` decode steps, and keeps the counters."""

    def __init__(self, planner: Planner, interval: int, now: float, cuda_graph: bool = False) -> None:
        self._planner = planner
        self._interval = interval
        self._cuda_graph = cuda_graph
        self._decode_steps = 0  # since the start
        self._decode_rows = 0
        self._line_at = now
        self._line_tokens = 0  # generated up to the last line
        self._line_drafts = DraftCounts()  # the same of speculation
        self._drafts = DraftCounts()  # between the last two lines
        self._retractions = 0  # logged so far
        self._preemptions = 0
        self._ratio = planner.growth.ratio
        self.gen_throughput = 0.0
        self.cache_hit_rate = 0.0

    def record_plan(self, plan: Plan | None) -> None:
        """Log a step that was decided, and retractions and preemptions since the last one."""
        if (total := self._planner.stats.retractions) > self._retractions:
            log.warning(
                "KV cache pool is full. Retract requests. #retracted_reqs: %d, #new_token_ratio: %.4f -> %.4f",
                total - self._retractions,
                self._ratio,
                self._planner.growth.ratio,
            )
            self._retractions = total
        if (total := self._planner.stats.preemptions) > self._preemptions:
            log.info("Preempt requests of lower priority. #preempted_reqs: %d", total - self._preemptions)
            self._preemptions = total
        self._ratio = self._planner.growth.ratio
        if plan and plan.prefills:
            self._prefill_line(plan)

    def record_results(self, plan: Plan, now: float) -> None:
        """Count a step whose results were applied."""
        if not (plan.decodes or plan.verifications):
            return
        self._decode_steps += 1
        self._decode_rows += plan.decodes + plan.verifications
        if self._decode_steps % self._interval == 0:
            self._decode_line(now)

    def counters(self) -> dict[str, Any]:
        """The scheduler's counters for `Probe`."""
        planner, stats, pool = self._planner, self._planner.stats, self._planner.pool
        page_size = planner.config.page_size
        return {
            "num_running_reqs": len(planner.running),
            "num_queue_reqs": len(planner.waiting),
            "num_waiting_reqs": len(planner.waiting),
            "num_waiting_uncached_tokens": sum(len(s.ids) for s in planner.waiting),
            "num_used_tokens": pool.used * page_size,
            "num_total_tokens": pool.used * page_size + sum(len(s.ids) for s in planner.waiting),
            "num_active_tokens": self._live_tokens(),
            "max_total_num_tokens": planner.config.total_tokens,
            "max_running_requests": planner.config.max_running,
            "token_usage": pool.usage,
            "kv_available_tokens": pool.pages.free * page_size,
            "kv_evictable_tokens": pool.tree.evictable * page_size,
            "utilization": len(planner.running) / planner.config.max_running,
            "gen_throughput": self.gen_throughput,
            "cache_hit_rate": self.cache_hit_rate,
            "new_token_ratio": planner.growth.ratio,
            "num_retracted_reqs": sum(1 for s in planner.waiting if s.retractions),
            "total_retracted_reqs": stats.retractions,
            "total_preempted_reqs": stats.preemptions,
            "num_paused_reqs": len(planner.running) if planner.paused else 0,
            "num_retracted_requests_total": stats.retractions,
            "num_preempted_requests_total": stats.preemptions,
            "evicted_tokens_total": pool.tree.evicted * page_size,
            "prompt_tokens_total": stats.prompt_tokens,
            "cached_tokens_total": stats.cached_tokens,
            "generation_tokens_total": stats.generation_tokens,
            "num_requests_total": stats.requests,
            "num_aborted_requests_total": stats.aborted,
            "num_refused_requests_total": stats.refused,
            "queue_time_seconds_total": stats.queue_s,
            "decode_steps_total": self._decode_steps,
            **self._speculation(),
            **(pool.tier.counters() if pool.tier else {}),
        }

    def _speculation(self) -> dict[str, float]:
        """Acceptance of drafts, with speculation on: between the last two log lines, and since the start."""
        if self._planner.config.drafts is None:
            return {}
        return {
            "spec_accept_length": self._drafts.accept_length,
            "spec_accept_rate": self._drafts.accept_rate,
            "avg_spec_accept_length": self._draft_counts().accept_length,
        }

    def _draft_counts(self) -> "DraftCounts":
        stats = self._planner.stats
        return DraftCounts(self._decode_rows, stats.proposed_drafts, stats.correct_drafts)

    def _prefill_line(self, plan: Plan) -> None:
        prefills = plan.prefills
        new_tokens = sum(part.end - part.start for part in prefills)
        self.cache_hit_rate = plan.cached_tokens / (new_tokens + plan.cached_tokens)
        log.info(
            "Prefill batch. #new-seq: %d, #new-token: %d, #cached-token: %d, token usage: %.2f, "
            "#running-req: %d, #queue-req: %d, ",
            len(prefills),
            new_tokens,
            plan.cached_tokens,
            plan.usage,
            plan.decodes + plan.verifications,
            len(self._planner.waiting),
        )

    def _decode_line(self, now: float) -> None:
        generated = self._planner.stats.generation_tokens
        self.gen_throughput = (generated - self._line_tokens) / max(now - self._line_at, 1e-9)
        self._line_at, self._line_tokens = now, generated
        counts = self._draft_counts()
        self._drafts, self._line_drafts = counts.since(self._line_drafts), counts
        live = self._live_tokens()
        log.info(
            "Decode batch. #running-req: %d, #token: %d, token usage: %.2f, %scuda graph: %s, "
            "gen throughput (token/s): %.2f, #queue-req: %d, ",
            len(self._planner.running),
            live,
            live / self._planner.config.total_tokens,
            f"accept len: {self._drafts.accept_length:.2f}, " if self._planner.config.drafts else "",
            self._cuda_graph,
            self.gen_throughput,
            len(self._planner.waiting),
        )

    def _live_tokens(self) -> int:
        """KV tokens of live requests; a shared prefix counts once."""
        computed = sum(s.computed for s in self._planner.running)
        return min(computed, self._planner.pool.used * self._planner.config.page_size)
