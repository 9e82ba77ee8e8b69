"""Carries out what the books of the tier behind the KV pool (`core/kv_tier.py`) say, once a turn of the loop.

The work is done by the part of this process (`tier_part.py`), or by those of all ranks (`rank_tier.py`). A fetch takes
at most a second and a quarter for every 1024 tokens: then its request goes on without it.

KV is that of the weights that serve, so it is kept under an identity: a hash of their values, the model's config, the
layout of the KV and the version of this program. After an update of the weights it is a random one, which no other
process finds again.
"""

import logging
import os
import re
import secrets
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.messages import SCHEDULER, process_key
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.files import MAX_SETTINGS_BYTES, read_small
from quartet.runtime.process.memory import in_words
from quartet.runtime.service import Boot
from quartet.runtime.version import version
from quartet.scheduler_service.core.block_keys import KEY_BYTES, digest
from quartet.scheduler_service.core.kv_tier import Fetch, Forget, KvTier, TierSizes
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT
from quartet.scheduler_service.core.tier_acts import (
    Brought,
    CarryOut,
    Clear,
    DropFile,
    DropMemory,
    EndRead,
    Keep,
    Put,
    PutState,
    ReadFiles,
    Store,
    TierPart,
    Written,
)
from quartet.scheduler_service.execution.kv_blocks import KvBlocks
from quartet.scheduler_service.execution.rank_messages import OpenTier
from quartet.scheduler_service.execution.rank_tier import LeadingPart
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.execution.tier_part import OwnPart, facts_of, own_part
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.host.block_files import NOT_USABLE, bytes_on_disk, drop_unused
from quartet.scheduler_service.host.device import shortage
from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)

OF_SCHEDULER = re.compile(rf"{SCHEDULER}(-\d{{1,4}})?")  # a directory in --kv-cache-dir with --dp-size

BLOCK_TOKENS = 64  # about: whole pages
PENDING_BYTES = 64 << 20  # copies that may wait to be written
FETCHED_BYTES = 32 << 20  # of one fetch: copying it to the pool delays a step
GIGABYTE = 10**9  # of --hicache-size, as elsewhere
FETCH_S = 1.0
FETCH_S_PER_TOKEN = 0.25 / 1024
NOT_FOR_THIS_MODEL = "{} keeps keys and values of models that generate, and {}; leave it out"


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A fetch that waits for its files."""

    fetch: Fetch
    until: float


class KvTierStore:
    """What the tier's part is told; the planner's pool has the books."""

    def __init__(
        self,
        planner: Planner,
        tier: KvTier,
        part: TierPart,
        identity: bytes,
        adapters: bytes,
        known: list[bytes],
        weights: Callable[[], object] = lambda: None,
    ) -> None:
        """`identity`: of the weights that serve now, and of all else that KV follows from. `known`: see KvTier.open.

        `adapters`: makes their versions unique. `weights` gives another object after an update.
        """
        self.planner, self.tier, self.part = planner, tier, part
        self._identity, self._adapters = identity, adapters
        self._weights, self._known_weights = weights, weights()
        self._outstanding: dict[int, Outstanding] = {}
        planner.pool.tier = tier
        tier.open(identity, adapters, known)

    @property
    def holds_up(self) -> bool:
        """Whether nothing runs, and what waits may wait for files."""
        return not self.planner.running and any(not one.fetch.given_up for one in self._outstanding.values())

    def turn(self, now: float) -> None:
        """Carry out what the books ask for, and take what the part has done."""
        self._carry_out_all(now)
        for result in self.part.results():
            if isinstance(result, Written):
                self._written(result)
            else:
                self._arrived(result)
        self._carry_out_all(now)
        for number, waiting in list(self._outstanding.items()):
            if number not in self.tier.fetches:  # of a generation that is over
                del self._outstanding[number]
            elif now >= waiting.until and not waiting.fetch.given_up:
                log.warning("Reading %d blocks of KV takes too long; going on without.", len(waiting.fetch.keys))
                self.tier.give_up(number)
        self.part.flush()

    def plan(self, now: float) -> Plan | None:
        """A turn, and the next step. Planning may take a request back whose pages go to others in the same step.

        So what is to be kept of them is copied before the step is launched.
        """
        self.turn(now)
        plan = self.planner.next(now)
        self._carry_out_all(now)
        self.part.flush()
        return plan

    def _carry_out_all(self, now: float) -> None:
        while self.tier.commands:
            self._carry_out(now)

    def _carry_out(self, now: float) -> None:
        """All that the books ask for. Fetches come last: they write to pages that stores may have to be copied from."""
        commands, self.tier.commands = self.tier.commands, []
        plain: list[Store | DropMemory | DropFile] = []
        for command in commands:
            match command:
                case Fetch():
                    continue
                case Forget():
                    self._have_done(plain)
                    self._forget()
                case Store() if not self.part.is_there:  # the pool has no memory
                    self.tier.refuse(command)
                case _:
                    plain.append(command)
        self._have_done(plain)
        for command in commands:
            if isinstance(command, Fetch):
                self._fetch(command, now)

    def _have_done(self, commands: list[Store | DropMemory | DropFile]) -> None:
        if commands:
            self.part.do(CarryOut(list(commands)))
            commands.clear()

    def _written(self, result: Written) -> None:
        self.tier.written(result.key, result.serial, result.ok)
        if not result.ok and result.key not in self.tier.files:
            self.part.do(CarryOut([DropFile(result.key)]))  # other ranks may have written theirs

    def _fetch(self, command: Fetch, now: float) -> None:
        """Begin to get blocks; where all are in memory, they are there at once."""
        files = [key for key in command.keys if key in command.files]
        if not files:
            self._restore(command, [])
            return
        tokens = len(command.keys) * self.tier.sizes.block_tokens
        self._outstanding[command.number] = Outstanding(command, now + FETCH_S + tokens * FETCH_S_PER_TOKEN)
        self.part.do(ReadFiles(command.number, files))

    def _arrived(self, result: Brought) -> None:
        waiting = self._outstanding.pop(result.number, None)
        if waiting is not None:
            files = [key for key in waiting.fetch.keys if key in waiting.fetch.files]
            self._restore(waiting.fetch, files[: result.good], result.damaged)
        self.part.do(EndRead(result.number))

    def _restore(self, command: Fetch, brought: list[bytes], damaged: bytes | None = None) -> None:
        """Put blocks that were fetched into pages of the tree, and keep those that came from files in memory too."""
        there = set(brought)
        found: list[bytes] = []
        for key in command.keys:
            if key not in there and key not in self.tier.memory:
                break
            found.append(key)
        wanted = self.tier.arrived(command.number, len(found), damaged)
        if wanted is None or not self.part.is_there:
            return
        blocks = min(len(found), command.blocks)
        restored = self.planner.pool.restore(wanted, blocks)
        if restored.pages:
            self.part.do(Put(command.number, found[:blocks], restored.skipped, restored.pages))
        if restored.snapshot != NO_SNAPSHOT:
            self.part.do(PutState(command.number, found[blocks:], restored.snapshot))
        for key in brought:
            if self.tier.keep(key):
                dropped, self.tier.commands = self.tier.commands, []  # what has to go for it, and a damaged file
                self._have_done([drop for drop in dropped if isinstance(drop, DropMemory | DropFile)])
                self.part.do(Keep(command.number, key))

    def _forget(self) -> None:
        """Begin anew, under another identity where the weights have changed."""
        self._outstanding.clear()
        weights = self._weights()
        if weights is not self._known_weights:
            self._known_weights, self._identity = weights, secrets.token_bytes(KEY_BYTES)
        self.part.do(Clear(self._identity))
        self.tier.open(self._identity, self._adapters)


def tier_store(
    boot: Boot, worker: Worker, updates: Updates, planner: Planner, followers: Followers | None = None
) -> KvTierStore | None:
    """The tier of one scheduler; None where no flag asks for one. Raises StartupError.

    `followers`: the other ranks of tensor parallel.
    """
    config = boot.config
    if not config.has_kv_tier:
        return None
    flag = "--kv-cache-dir" if config.kv_cache_dir else "--enable-hierarchical-cache"
    if worker.info.is_embedding:
        raise StartupError(NOT_FOR_THIS_MODEL.format(flag, "this one embeds"))
    if not worker.cache.keys:
        raise StartupError(NOT_FOR_THIS_MODEL.format(flag, "this one has recurrent layers only"))
    blocks = KvBlocks(worker.cache, block_tokens(worker.page_size), worker.state_cache)
    sizes = sizes_of(config, blocks, worker.page_count, worker.device)
    ranks = 1 if followers is None else followers.parallel.size
    opening = OpenTier(sizes.block_tokens, sizes.memory_blocks, sizes.most_fetched, ranks, directory_of(boot))
    part: OwnPart | LeadingPart = own_part(opening, blocks)
    if not boot.rank:  # one of several schedulers does it for all
        drop_former(config)
    facts = [facts_of(worker.model.weights, blocks), f"deterministic {config.enable_deterministic_inference}"]
    if followers is not None:
        part = LeadingPart(part, followers)
        facts += part.begin(opening)
    model_config = read_small(model_info.model_dir(config) / "config.json", MAX_SETTINGS_BYTES)
    identity = identity_of(facts, model_config)
    try:
        known = part.open(identity)
    except OSError as error:
        raise StartupError(NOT_USABLE.format(opening.directory, error.strerror)) from error
    tier = KvTier(worker.page_size, sizes)
    adapters = secrets.token_bytes(KEY_BYTES)
    store = KvTierStore(planner, tier, part, identity, adapters, known, lambda: updates.committed)
    log.info(
        "KV beyond the pool: %d blocks of %d tokens in memory (%s), %d in files (%s), of which %d are there.",
        sizes.memory_blocks,
        sizes.block_tokens,
        in_words(sizes.memory_blocks * blocks.block_bytes),
        sizes.file_blocks,
        in_words(sizes.file_blocks * blocks.block_bytes),
        len(tier.files),
    )
    return store


def directory_of(boot: Boot) -> str | None:
    """Where the files of one scheduler lie; None: it has none."""
    if boot.config.kv_cache_dir is None:
        return None
    directory = Path(boot.config.kv_cache_dir).absolute()
    return str(directory / boot.key if boot.config.dp_size > 1 else directory)


def drop_former(config: ResolvedConfig) -> None:
    """Delete what other numbers of schedulers have left in --kv-cache-dir. Raises StartupError."""
    if config.kv_cache_dir is None:
        return
    directory = Path(config.kv_cache_dir).absolute()
    several = config.dp_size > 1
    own = {process_key(SCHEDULER, rank) for rank in range(config.dp_size)} if several else set()
    try:
        if several:
            drop_unused(directory)
        for entry in list(os.scandir(directory)):
            if OF_SCHEDULER.fullmatch(entry.name) and entry.name not in own and entry.is_dir(follow_symlinks=False):
                drop_unused(Path(entry.path))
    except OSError as error:
        raise StartupError(NOT_USABLE.format(directory, error.strerror)) from error


def block_tokens(page_size: int) -> int:
    """Tokens of a block: about BLOCK_TOKENS, in whole pages."""
    return max(1, BLOCK_TOKENS // page_size) * page_size


def identity_of(facts: list[str], model_config: bytes) -> bytes:
    """What KV follows from, besides ids and adapters. `facts`: of each rank's part, see `facts_of`."""
    return digest(*(fact.encode() for fact in facts), model_config, version().encode(), sys.byteorder.encode())


def sizes_of(config: ResolvedConfig, blocks: KvBlocks, pool_pages: int, device: torch.device) -> TierSizes:
    """How much the tier may hold. Raises StartupError where that is less than a block, or there is no room for it."""
    size, tokens = blocks.block_bytes, blocks.block_tokens
    memory = files = 0
    if config.enable_hierarchical_cache:
        pool_bytes = pool_pages * blocks.cache.page_size * size // tokens
        assert config.hicache_ratio is not None, "resolve decides it"
        wanted = config.hicache_size * GIGABYTE if config.hicache_size else int(config.hicache_ratio * pool_bytes)
        memory = int(wanted // size)
        if memory < 1:
            raise StartupError(f"--hicache-size: a block of {tokens} tokens has {in_words(size)}; give it more")
        if reason := shortage(memory * size * config.ranks_here, torch.device("cpu")):
            raise StartupError(f"no room for --enable-hierarchical-cache: {reason}; lower --hicache-ratio")
    if config.kv_cache_dir:
        files = config.kv_cache_dir_size // (config.dp_size * config.ranks_here) // bytes_on_disk(size)
        if files < 1:
            raise StartupError(
                f"--kv-cache-dir-size {config.kv_cache_dir_size} is less than one block of {tokens} tokens "
                f"({bytes_on_disk(size)} bytes on the disk); give it more"
            )
    pending, pieces = max(2, PENDING_BYTES // size, 2 * blocks.state_pieces), blocks.state_pieces
    return TierSizes(tokens, size, memory, files, pending, max(2, FETCHED_BYTES // size), pieces)
