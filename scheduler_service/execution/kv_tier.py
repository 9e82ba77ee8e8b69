"""Carries out what the books of the tier behind the KV pool (`core/kv_tier.py`) say, once a turn of the loop.

Copies between the pool and host memory are made here, between two steps; files are read and written in the threads of
`BlockIO`. A fetch takes at most a second and a quarter for every 1024 tokens: then its request goes on without it.

KV is that of the weights that serve, so it is kept under an identity: a hash of their values, the model's config, the
layout of the KV and the version of this program. After an update of the weights it is a random one, which no other
process finds again.
"""

import logging
import secrets
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.files import MAX_SETTINGS_BYTES, read_small
from quartet.runtime.process.memory import in_words
from quartet.runtime.service import Boot
from quartet.runtime.version import version
from quartet.scheduler_service.core.block_keys import KEY_BYTES, digest
from quartet.scheduler_service.core.kv_tier import DropFile, DropMemory, Fetch, Forget, KvTier, Store, TierSizes
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.execution.kv_blocks import KvBlocks, MemoryBlocks
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.host.block_files import BlockFiles, bytes_on_disk
from quartet.scheduler_service.host.block_io import BlockIO, Read, Written
from quartet.scheduler_service.host.device import shortage
from quartet.scheduler_service.host.transfer import Arrival, fetch
from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)

BLOCK_TOKENS = 64  # about: whole pages
PENDING_BYTES = 64 << 20  # copies that may wait to be written
FETCHED_BYTES = 32 << 20  # of one fetch: copying it to the pool delays a step
GIGABYTE = 10**9  # of --hicache-size, as elsewhere
FETCH_S = 1.0
FETCH_S_PER_TOKEN = 0.25 / 1024
NOT_FOR_THIS_MODEL = "{} keeps keys and values of models that generate, and {}; leave it out"


@dataclass(frozen=True, slots=True)
class Copy:
    """A block that was copied out of the pool."""

    row: torch.Tensor  # (bytes,) uint8, on the device
    host: torch.Tensor  # the same on the host, once `arrival` was waited for; for files only
    arrival: Arrival


@dataclass(frozen=True, slots=True)
class Outstanding:
    """A fetch that waits for its files."""

    fetch: Fetch
    until: float


class KvTierStore:
    """Memory and files of the tier; the planner's pool has the books."""

    def __init__(
        self,
        planner: Planner,
        tier: KvTier,
        blocks: KvBlocks,
        device: torch.device,
        files: BlockFiles | None,
        identity: bytes,
        adapters: bytes,
        weights: Callable[[], object] = lambda: None,
    ) -> None:
        """`identity`: of the weights that serve now, and of all else that KV follows from.

        `adapters`: makes their versions unique. `weights` gives another object after an update. Raises StartupError.
        """
        self.planner, self.tier = planner, tier
        self._blocks = blocks
        self._device = device
        self._memory = MemoryBlocks(tier.sizes.memory_blocks, blocks.block_bytes, device)
        self._identity, self._adapters = identity, adapters
        self._weights, self._known_weights = weights, weights()
        self._outstanding: dict[int, Outstanding] = {}
        self._io: BlockIO | None = None
        known: list[bytes] = []
        if files is not None:
            try:
                known = files.begin(identity)
            except OSError as error:
                raise StartupError(f"--kv-cache-dir {files.directory} cannot be used: {error.strerror}") from error
            self._io = BlockIO(files)
        planner.pool.tier = tier
        tier.open(identity, adapters, known)

    @property
    def holds_up(self) -> bool:
        """Whether nothing runs, and what waits may wait for files."""
        return not self.planner.running and any(not one.fetch.given_up for one in self._outstanding.values())

    def turn(self, now: float) -> None:
        """Carry out what the books ask for, and take what the threads have done."""
        self._carry_out_all(now)
        for result in self._io.results() if self._io else ():
            if isinstance(result, Written):
                self.tier.written(result.key, result.serial, result.ok)
            else:
                self._arrived(result, now)
        self._carry_out_all(now)
        for number, waiting in list(self._outstanding.items()):
            if number not in self.tier.fetches:  # of a generation that is over
                del self._outstanding[number]
            elif now >= waiting.until and not waiting.fetch.given_up:
                log.warning("Reading %d blocks of KV takes too long; going on without.", len(waiting.fetch.keys))
                self.tier.give_up(number)

    def _carry_out_all(self, now: float) -> None:
        while self.tier.commands:
            self._carry_out(now)

    def _carry_out(self, now: float) -> None:
        """All that the books ask for. Fetches come last: they write to pages that stores may have to be copied from."""
        commands, self.tier.commands = self.tier.commands, []
        copies = self._copies([command for command in commands if isinstance(command, Store)])
        for command in commands:
            match command:
                case Store():
                    self._store(command, next(copies))
                case DropMemory(key):
                    self._memory.drop(key)
                case DropFile(key) if self._io:
                    self._io.delete(key)
                case Forget():
                    self._forget()
        for command in commands:
            if isinstance(command, Fetch):
                self._fetch(command, now)

    def _copies(self, stores: list[Store]) -> Iterator[Copy | None]:
        """A copy of each block's pages, made some blocks at a time; None while the pool has no memory."""
        most = self.tier.sizes.most_fetched
        for start in range(0, len(stores), most):
            some = stores[start : start + most]
            if not self._blocks.is_there:
                yield from [None] * len(some)
                continue
            rows = self._blocks.gather([page for store in some for page in store.pages])
            host = fetch(rows) if any(store.file for store in some) else rows
            arrival = Arrival(self._device)
            yield from (Copy(*pair, arrival) for pair in zip(rows, host, strict=True))

    def _store(self, command: Store, copy: Copy | None) -> None:
        if copy is None:
            self.tier.refuse(command)
            return
        if command.memory:
            self._memory.put(command.key, copy.row)
        if command.file and self._io:
            self._io.write(command.key, command.serial, copy.host.numpy().data, copy.arrival.wait)

    def _fetch(self, command: Fetch, now: float) -> None:
        """Begin to get blocks; where all are in memory, they are there at once."""
        files = [key for key in command.keys if key in command.files]
        if not files:
            self._restore(command, {}, now)
        elif self._io:
            tokens = len(command.keys) * self.tier.sizes.block_tokens
            self._outstanding[command.number] = Outstanding(command, now + FETCH_S + tokens * FETCH_S_PER_TOKEN)
            self._io.read(command.number, files)

    def _arrived(self, read: Read, now: float) -> None:
        waiting = self._outstanding.pop(read.number, None)
        if waiting is None:
            return
        if read.damaged is not None:
            log.warning("A block of KV is damaged or gone; it will be computed again.")
        data = torch.frombuffer(read.data, dtype=torch.uint8).view(-1, self._blocks.block_bytes)
        rows = dict(zip(read.good, data, strict=False))
        self._restore(waiting.fetch, rows, now, read.damaged)

    def _restore(
        self, command: Fetch, rows: dict[bytes, torch.Tensor], now: float, damaged: bytes | None = None
    ) -> None:
        """Put blocks that were fetched into pages of the tree, and keep those that came from files in memory too."""
        found: list[torch.Tensor] = []
        for key in command.keys:
            row = rows[key] if key in rows else self._memory.get(key) if key in self._memory else None
            if row is None:
                break
            found.append(row)
        wanted = self.tier.arrived(command.number, len(found), damaged)
        if wanted is None or not self._blocks.is_there:
            return
        restored = self.planner.pool.restore(wanted, len(found))
        if restored.pages:
            self._blocks.scatter(torch.stack(found), restored.skipped, restored.pages)
        for key, row in rows.items():
            if self.tier.keep(key):
                self._carry_out(now)  # what has to go for it; nothing else is left to do here
                self._memory.put(key, row)

    def _forget(self) -> None:
        """Begin anew, under another identity where the weights have changed."""
        self._memory.clear()
        self._outstanding.clear()
        weights = self._weights()
        if weights is not self._known_weights:
            self._known_weights, self._identity = weights, secrets.token_bytes(KEY_BYTES)
        if self._io:
            self._io.forget(self._identity)
        self.tier.open(self._identity, self._adapters)


def tier_store(boot: Boot, worker: Worker, updates: Updates, planner: Planner) -> KvTierStore | None:
    """The tier of one scheduler; None where no flag asks for one. Raises StartupError."""
    config = boot.config
    if not config.has_kv_tier:
        return None
    flag = "--kv-cache-dir" if config.kv_cache_dir else "--enable-hierarchical-cache"
    if worker.info.is_embedding:
        raise StartupError(NOT_FOR_THIS_MODEL.format(flag, "this one embeds"))
    if worker.state_cache is not None or not worker.cache.keys:
        raise StartupError(NOT_FOR_THIS_MODEL.format(flag, "this one has recurrent layers with states of their own"))
    blocks = KvBlocks(worker.cache, block_tokens(worker.page_size))
    tier = KvTier(worker.page_size, sizes_of(config, blocks, worker.page_count, worker.device))
    files = None
    if config.kv_cache_dir:
        directory = Path(config.kv_cache_dir).absolute()
        files = BlockFiles(directory / boot.key if config.dp_size > 1 else directory, blocks.block_bytes)
    inspection = updates.inspection
    _, values = inspection.checksums(inspection.names(None))
    model_config = read_small(model_info.model_dir(config) / "config.json", MAX_SETTINGS_BYTES)
    identity = identity_of(values, blocks.layout, model_config)
    store = KvTierStore(
        planner, tier, blocks, worker.device, files, identity, secrets.token_bytes(KEY_BYTES), lambda: updates.committed
    )
    log.info(
        "KV beyond the pool: %d blocks of %d tokens in memory (%s), %d in files (%s), of which %d are there.",
        tier.sizes.memory_blocks,
        tier.sizes.block_tokens,
        in_words(tier.sizes.memory_blocks * blocks.block_bytes),
        tier.sizes.file_blocks,
        in_words(tier.sizes.file_blocks * blocks.block_bytes),
        len(tier.files),
    )
    return store


def block_tokens(page_size: int) -> int:
    """Tokens of a block: about BLOCK_TOKENS, in whole pages."""
    return max(1, BLOCK_TOKENS // page_size) * page_size


def identity_of(weights: str, layout: str, model_config: bytes) -> bytes:
    """What KV follows from, besides ids and adapters. `weights`: a hash of their values."""
    return digest(weights.encode(), layout.encode(), model_config, version().encode(), sys.byteorder.encode())


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
        if reason := shortage(memory * size, torch.device("cpu")):
            raise StartupError(f"no room for --enable-hierarchical-cache: {reason}; lower --hicache-ratio")
    if config.kv_cache_dir:
        files = config.kv_cache_dir_size // config.dp_size // bytes_on_disk(size)
        if files < 1:
            raise StartupError(
                f"--kv-cache-dir-size {config.kv_cache_dir_size} is less than one block of {tokens} tokens "
                f"({bytes_on_disk(size)} bytes on the disk); give it more"
            )
    return TierSizes(tokens, size, memory, files, max(2, PENDING_BYTES // size), max(2, FETCHED_BYTES // size))
