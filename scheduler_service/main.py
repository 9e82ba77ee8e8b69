"""The scheduler process: `python -m quartet.scheduler_service.main`."""

import logging
import os
from functools import partial

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

import msgspec
import setproctitle

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.service import TITLE, Boot, run
from quartet.scheduler_service.assemble import serve
from quartet.scheduler_service.control.idle import IdleSleep
from quartet.scheduler_service.execution.kv_tier import tier_store
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from quartet.scheduler_service.execution.rank_memory import LeadingSaver
from quartet.scheduler_service.execution.rank_updates import LeadingUpdates
from quartet.scheduler_service.execution.ranks import Followers, load_part, start_followers
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.grammar.matchers import GrammarCompiler
from quartet.scheduler_service.grammar.pool import GrammarPool
from quartet.scheduler_service.host.pool_size import note_size, sized_as_before
from quartet.scheduler_service.model.registry import check_ranks
from quartet.scheduler_service.model.same_model import check_same_model
from quartet.scheduler_service.weights import record
from quartet.scheduler_service.weights.record import Committed
from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)


def main(boot: Boot) -> None:
    """Load the model and serve it until killed. Raises StartupError."""
    record.begin(boot.config, boot.own_dir, boot.run_dir)
    config = sized_as_before(record.restored(boot.config, boot.own_dir), boot.own_dir)
    to_read = Committed.at_start(config)
    info = model_facts(boot.config, config)
    if info.is_embedding:
        log.info("Overlap scheduler is disabled for embedding models.")
    if boot.config.tp_size > 1:
        lead(boot, config, info, to_read)
        return
    worker = Worker(config, info)
    record.check_unchanged(to_read, boot.config, boot.own_dir)
    note_size(config, boot.own_dir, worker.facts().max_total_num_tokens)
    adapters = worker.load_adapters(boot.config, boot.own_dir)
    updates = weight_updates(config, info, worker, boot.own_dir)
    grammars = grammar_pool(config, info, worker.facts().vocab_size)
    saver, sleeper = memory_saver(config, worker, updates), idle_sleep(config, worker, updates)
    make_tier = partial(tier_store, boot, worker, updates)
    serve(boot, info, worker, grammars, updates, saver, sleeper, adapters, make_tier)


def lead(boot: Boot, config: ResolvedConfig, info: ModelInfo, to_read: Committed) -> None:
    """Serve as rank 0 of several that compute the model together. Raises StartupError."""
    check_ranks(config, info)
    setproctitle.setproctitle(TITLE.format(role=f"{boot.title} TP0"))
    followers, store = start_followers(boot, config, info)
    worker = Worker(config, info, partial(load_part, parallel=followers.parallel, store=store), followers=followers)
    record.check_unchanged(to_read, boot.config, boot.own_dir)
    note_size(config, boot.own_dir, worker.facts().max_total_num_tokens)
    adapters = worker.load_adapters(boot.config, boot.own_dir)
    same_model = partial(check_same_model, info, config)
    updates = LeadingUpdates(worker.model.weights, config, boot.own_dir, same_model, followers)
    grammars = grammar_pool(config, info, worker.facts().vocab_size)
    saver = memory_saver(config, worker, updates, followers)
    sleeper = idle_sleep(config, worker, updates, followers)
    make_tier = partial(tier_store, boot, worker, updates, followers=followers)
    serve(boot, info, worker, grammars, updates, saver, sleeper, adapters, make_tier)


def model_facts(started: ResolvedConfig, restored: ResolvedConfig) -> ModelInfo:
    """The model info of the first start, with the directory of the weights served now, which may hold nothing else."""
    return msgspec.structs.replace(model_info.load(started), path=str(model_info.model_dir(restored)))


def weight_updates(config: ResolvedConfig, info: ModelInfo, worker: Worker, run_dir: str) -> Updates:
    return Updates(worker.model.weights, config, run_dir, partial(check_same_model, info, config))


def saver_of(worker: Worker, updates: Updates, keep_weights: bool, followers: Followers | None) -> MemorySaver:
    """What gives memory back and takes it again, of all ranks."""
    if followers is not None:
        return LeadingSaver(updates, worker.cache, keep_weights, followers, worker.state_cache)
    return MemorySaver(
        updates,
        worker.cache,
        keep_weights,
        on_release=worker.forget_graphs,
        states=worker.state_cache,
        adapters=worker.adapter_pool,
    )


def memory_saver(
    config: ResolvedConfig, worker: Worker, updates: Updates, followers: Followers | None = None
) -> MemorySaver | None:
    """What gives memory back when a client asks for it; None without --enable-memory-saver."""
    if not config.enable_memory_saver:
        return None
    return saver_of(worker, updates, config.enable_weights_cpu_backup, followers)


def idle_sleep(
    config: ResolvedConfig, worker: Worker, updates: Updates, followers: Followers | None = None
) -> IdleSleep | None:
    """What gives memory back while nothing is asked; None without --sleep-when-idle-s."""
    if not config.sleep_when_idle_s:
        return None
    read_again = updates.reread if isinstance(updates, LeadingUpdates) else None
    saver = saver_of(worker, updates, keep_weights=False, followers=followers)
    return IdleSleep(config.sleep_when_idle_s, saver, updates, read_again)


def grammar_pool(config: ResolvedConfig, info: ModelInfo, vocab_size: int) -> GrammarPool | None:
    """Compiles the grammars of a generating model; loads the tokenizer in the background, or with the first of them."""
    if info.is_embedding:
        return None
    pool = GrammarPool(GrammarCompiler(model_info.tokenizer_dir(config), vocab_size, info.eos_ids))
    if not config.low_memory:
        pool.warm()
    return pool


if __name__ == "__main__":
    run(main)
