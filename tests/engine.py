"""Planner and Worker in one process, without sockets: what a scheduler does, for tests that look at numbers."""

from array import array
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from quartet.runtime.messages import Finish, LogprobOptions, Logprobs, Request, Tokenized, pack_ids, unpack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.assemble import draft_options
from quartet.scheduler_service.core.logprobs import concatenated
from quartet.scheduler_service.core.plan import Update
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.grammar.matchers import Grammar, GrammarCompiler
from tests.configs import resolved

DEFAULTS: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 4,
    "max_total_tokens": 8192,
    "chunked_prefill_size": -1,
}


def floats(data: bytes) -> list[float]:
    return list(array("f", data))


def joined(left: Logprobs | None, right: Logprobs) -> Logprobs:
    """Two runs of positions, one behind the other."""
    if left is None:
        return right
    return concatenated([left, right])


@dataclass
class Answer:
    """All that a request has produced."""

    ids: list[int] = field(default_factory=list)
    logprobs: Logprobs | None = None
    input_logprobs: Logprobs | None = None
    hidden_states: list[float] = field(default_factory=list)
    routed_experts: bytes = b""
    cached_tokens: int = 0
    retractions: int = 0
    finish: Finish | None = None

    def take(self, update: Update) -> None:
        assert self.finish is None, "an update behind the last one"
        self.ids += unpack_ids(update.ids)
        if update.logprobs:
            self.logprobs = joined(self.logprobs, update.logprobs)
        if update.input_logprobs:
            self.input_logprobs = update.input_logprobs
        self.hidden_states += floats(update.hidden_states)
        self.routed_experts += update.routed_experts
        self.cached_tokens = update.sequence.cached_tokens
        self.retractions = update.sequence.retractions
        self.finish = update.finish


class Engine:
    """Serves requests step by step on a virtual clock."""

    def __init__(
        self,
        directory: Path,
        *,
        worker: Worker | None = None,
        make_worker: Callable[..., Worker] = Worker,
        **settings: Any,
    ) -> None:
        self.config = resolved(model_path=str(directory), model_dir=str(directory), **(DEFAULTS | settings))
        info = model_info.load(self.config)
        self.worker = worker or make_worker(self.config, info)
        self.planner = Planner(
            PlannerConfig(
                page_size=self.worker.page_size,
                total_pages=self.worker.page_count,
                max_running=self.worker.max_running_requests,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
                eos_ids=frozenset(info.eos_ids),
                chunked_prefill_size=self.config.chunked_prefill_size,
                reuse_prefixes=not self.config.disable_radix_cache,
                snapshots=self.worker.snapshots,
                drafts=draft_options(self.config),
                max_adapters=self.config.max_loras_per_batch,
            )
        )
        self.compiler = GrammarCompiler(directory, self.worker.model.vocab_size, info.eos_ids)
        self.answers: dict[str, Answer] = {}
        self.steps = 0
        self.computed: list[tuple[str, int, int]] = []  # rid and positions of every slice that ran

    def add(
        self,
        prompt: list[int],
        params: SamplingParams | None = None,
        rid: str = "",
        embeds: bytes = b"",
        grammar: Grammar | None = None,
        **request: Any,
    ) -> str:
        """`grammar`: in place of the one that the parameters name."""
        rid = rid or f"r{len(self.answers)}"
        made = Request(rid=rid, params=params or SamplingParams(temperature=0.0), **request)
        self.answers[rid] = Answer()
        message = Tokenized(request=made, prompt_ids=pack_ids(prompt), embeds=embeds)
        if grammar is None and made.params.grammar:
            grammar = self.compiler.compile(*made.params.grammar)
        self.take(self.planner.add(message, float(self.steps), grammar))
        return rid

    def take(self, updates: list[Update]) -> None:
        for update in updates:
            self.answers[update.sequence.rid].take(update)

    def step(self) -> bool:
        """One step; False when there was nothing to do."""
        plan = self.planner.next(float(self.steps))
        if plan is None:
            return False
        self.computed += [(share.sequence.rid, share.start, share.end) for share in plan.slices]
        results = self.worker.collect(self.worker.launch(plan))
        self.take(self.planner.apply(plan, results, float(self.steps)))
        for sequence in self.planner.released:
            self.worker.forget(sequence)
        self.planner.released.clear()
        self.planner.check_invariants()
        self.steps += 1
        return True

    def run(self) -> None:
        """Until nothing is left to do; all state must be back then."""
        while self.step():
            pass
        assert self.planner.idle and not self.worker.states, (self.planner.waiting, self.worker.states)

    def generate(
        self, prompts: list[list[int]], params: list[SamplingParams] | SamplingParams, **request: Any
    ) -> list[Answer]:
        """All prompts at once."""
        each = params if isinstance(params, list) else [params] * len(prompts)
        rids = [self.add(prompt, its_params, **request) for prompt, its_params in zip(prompts, each, strict=True)]
        self.run()
        return [self.answers[rid] for rid in rids]


ALL_LOGPROBS = LogprobOptions(start=0)
