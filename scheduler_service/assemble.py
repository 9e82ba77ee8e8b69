"""Builds the scheduler from a boot file, the model info and a worker, and serves. Does not import torch."""

import gc
import os
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

import msgspec

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.messages import Facts
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process.progress import ProgressWord
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.service import Boot, announced, report_ready
from quartet.runtime.sockets import Inbox, Outbox
from quartet.scheduler_service.control.durable_state import DurableState
from quartet.scheduler_service.core.drafts import DraftOptions
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.core.snapshots import SnapshotOptions
from quartet.scheduler_service.grammar.grammar_queue import Pool
from quartet.scheduler_service.scheduler import Scheduler, Worker

if TYPE_CHECKING:
    from quartet.scheduler_service.control.idle import Sleeper
    from quartet.scheduler_service.execution.adapters import AdapterStore
    from quartet.scheduler_service.execution.kv_tier import KvTierStore
    from quartet.scheduler_service.execution.memory_saver import MemorySaver
    from quartet.scheduler_service.weights.update import Updates

UNLIMITED = -1
MAX_DRAFT_ROWS = {"cpu": 32, "cuda": 64}  # of a step with drafts, by device: up to here a row more costs little time


class SizedWorker(Worker, Protocol):
    """A worker with the sizes that its memory allows."""

    page_size: int
    page_count: int  # usable pages; page 0 is not among them
    max_running_requests: int
    depth: int  # see Scheduler
    snapshots: SnapshotOptions | None  # of a model with recurrent layers

    @property
    def uses_graphs(self) -> bool: ...

    def facts(self) -> Facts: ...

    def idle_work(self) -> bool:
        """Do a short piece of work while nothing is to compute; returns whether there is more."""
        ...


def planner_config(config: ResolvedConfig, info: ModelInfo, worker: SizedWorker) -> PlannerConfig:
    """The planner's part of the configuration, with the sizes of the worker."""
    whole = info.embedding is not None and info.embedding.whole_prompts
    chunk = config.chunked_prefill_size
    step_tokens = chunk if whole and chunk > 0 else config.max_prefill_tokens
    return PlannerConfig(
        page_size=worker.page_size,
        total_pages=worker.page_count,
        max_running=worker.max_running_requests,
        context_length=info.context_length,
        vocab_size=info.vocab_size,
        eos_ids=frozenset(info.eos_ids),
        chunked_prefill_size=UNLIMITED if whole else chunk,
        max_prefill_tokens=step_tokens,  # whole prompts are not split: the last one of a step may exceed this
        policy=config.schedule_policy,
        low_values_first=config.schedule_low_priority_values_first,
        preemption_threshold=config.preemption_threshold,
        waiting_timeout_s=config.waiting_timeout_s,
        running_timeout_s=config.running_timeout_s,
        max_queued=config.max_queued_requests,
        reuse_prefixes=not (config.disable_radix_cache or whole),
        snapshots=worker.snapshots,
        drafts=draft_options(config),
        max_adapters=config.max_loras_per_batch,
        clips_output=config.allow_auto_truncate,
        default_new_tokens=SamplingParams().max_new_tokens,
    )


def draft_options(config: ResolvedConfig) -> DraftOptions | None:
    """Options of speculative decoding; None where it is off."""
    sizes = config.speculation
    if sizes is None:
        return None
    return DraftOptions(sizes.max_draft_tokens, sizes.min_match, sizes.max_match, MAX_DRAFT_ROWS[config.device])


def serve(
    boot: Boot,
    info: ModelInfo,
    worker: SizedWorker,
    grammars: Pool | None = None,
    updates: "Updates | None" = None,
    saver: "MemorySaver | None" = None,
    sleeper: "Sleeper | None" = None,
    adapters: "AdapterStore | None" = None,
    make_tier: "Callable[[Planner], KvTierStore | None]" = lambda planner: None,
) -> None:
    """Report ready, send the model's facts through the ring, and run until killed.

    Without `grammars`, requests with a grammar are refused; without `adapters`, those that name one. Without `updates`
    or `saver`, commands that change the weights or release memory are refused. `make_tier`: of KV beyond the pool.
    """
    planner = Planner(planner_config(boot.config, info, worker))
    durable_state = DurableState(boot.own_dir)
    facts = msgspec.structs.replace(
        worker.facts(),
        rank=boot.rank,
        epoch=boot.epoch,
        pid=os.getpid(),
        max_req_input_len=planner.config.max_input_len,
    )
    progress = ProgressWord(boot.run_dir, boot.key)
    scheduler = Scheduler(
        planner,
        worker,
        Inbox(boot.inbox),
        Outbox(boot.outbox, progress.wait),
        progress,
        facts=facts,
        depth=worker.depth,
        idle_work=worker.idle_work,
        cuda_graph=worker.uses_graphs,
        decode_log_interval=boot.config.decode_log_interval,
        hidden_size=info.hidden_size,
        grammars=grammars,
        updates=updates,
        saver=saver,
        sleeper=sleeper,
        tier=make_tier(planner),
        adapters=adapters,
        durable_state=durable_state,
        announced=announced(boot),
    )
    progress.beat(busy=False)
    durable_state.restore(scheduler)
    report_ready(boot)
    scheduler.emit(scheduler.introduce())
    gc.freeze()  # the model and its libraries are never freed: later collections skip them
    scheduler.run()
