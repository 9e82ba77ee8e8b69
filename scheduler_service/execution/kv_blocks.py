"""Blocks of KV as bytes: copied out of the pages of the pool, and back into others; and those kept in host memory.

A block holds, for every layer in order, the keys and then the values (heads, tokens of the block, dim) of its tokens;
only the keys where the values are the same. `rows` are blocks side by side, (blocks, bytes of one) uint8. A snapshot
of recurrent state is cut into pieces of that size.
"""

import torch

from quartet.scheduler_service.core.pages import runs_of
from quartet.scheduler_service.execution.kv_cache import KVCache, untouched_zeros
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.host.transfer import Arrival, send


class KvBlocks:
    """Copies blocks between the pool's pages and rows."""

    def __init__(self, cache: KVCache, block_tokens: int, states: StateCache | None = None) -> None:
        """`states`: of a model with recurrent layers."""
        self.cache = cache
        self._states = states
        self.block_tokens = block_tokens
        self.device = next(iter(cache.keys.values())).device
        self.block_bytes = sum(self._bytes_of(pool) for pool in self._pools())
        self._state_bytes = 0 if states is None else sum(spec.nbytes for spec in states.specs)
        self.state_pieces = -(-self._state_bytes // self.block_bytes)

    @property
    def is_there(self) -> bool:
        """Whether the pool has its memory."""
        return bool(self.cache.keys)

    @property
    def layout(self) -> str:
        """What two blocks must share for their bytes to mean the same."""
        cache = self.cache
        pools = [(layer, *pool.shape[::2], cache.values[layer] is pool) for layer, pool in sorted(cache.keys.items())]
        dtype = next(iter(cache.keys.values())).dtype
        states = [] if self._states is None else [str(spec) for spec in self._states.specs]
        return f"{self.block_tokens} tokens of {dtype}: {pools} {states}"

    def _pools(self) -> list[torch.Tensor]:
        """The pool's tensors (heads, tokens, dim), in the order in which a block has them."""
        cache = self.cache
        both = [(cache.keys[layer], cache.values[layer]) for layer in sorted(cache.keys)]
        return [pool for keys, values in both for pool in ((keys,) if values is keys else (keys, values))]

    def _bytes_of(self, pool: torch.Tensor) -> int:
        return pool.shape[0] * self.block_tokens * pool.shape[2] * pool.dtype.itemsize

    @torch.inference_mode()
    def gather(self, pages: list[int]) -> torch.Tensor:
        """The blocks in these pages as rows on the device."""
        size, first = self.cache.page_size, torch.tensor(pages, dtype=torch.int64)
        slots = (first[:, None] * size + torch.arange(size)).flatten()
        slots = send(slots, self.device)
        count = len(slots) // self.block_tokens
        rows = torch.empty(count, self.block_bytes, dtype=torch.uint8, device=self.device)
        at = 0
        for pool in self._pools():
            heads, _, dim = pool.shape
            there = rows[:, at : at + self._bytes_of(pool)].view(pool.dtype)
            blocks = pool.index_select(1, slots).view(heads, count, -1)  # (heads, blocks, tokens * dim)
            there.unflatten(1, (heads, self.block_tokens * dim)).copy_(blocks.transpose(0, 1))
            at += self._bytes_of(pool)
        return rows

    @torch.inference_mode()
    def scatter(self, rows: torch.Tensor, skipped: int, pages: list[int]) -> None:
        """Fill pages with what lies in rows of the host, from `skipped` pages behind their beginning on."""
        size = self.cache.page_size
        first, count = skipped * size // self.block_tokens, len(pages) * size
        last = -(-(skipped * size + count) // self.block_tokens)
        rows = send(rows[first:last], self.device)
        begin = skipped * size - first * self.block_tokens
        at = 0
        for pool in self._pools():
            heads, _, dim = pool.shape
            blocks = rows[:, at : at + self._bytes_of(pool)].view(pool.dtype).unflatten(1, (heads, -1, dim))
            tokens = blocks.transpose(0, 1).flatten(1, 2)[:, begin : begin + count]  # (heads, tokens, dim)
            done = 0
            for page, run in runs_of(pages):
                pool[:, page * size : (page + run) * size] = tokens[:, done : done + run * size]
                done += run * size
            at += self._bytes_of(pool)

    @torch.inference_mode()
    def gather_state(self, snapshot: int) -> torch.Tensor:
        """The pieces of a snapshot as rows on the device; behind its last byte are zeros."""
        assert self._states is not None
        rows = torch.zeros(self.state_pieces, self.block_bytes, dtype=torch.uint8, device=self.device)
        flat, at = rows.view(-1), 0
        for part in self._states.snapshot(snapshot):
            data = part.contiguous().view(-1).view(torch.uint8)
            flat[at : at + len(data)] = data
            at += len(data)
        return rows

    @torch.inference_mode()
    def scatter_state(self, rows: torch.Tensor, snapshot: int) -> None:
        """Fill a snapshot with its pieces, rows of the host."""
        assert self._states is not None
        flat, at = send(rows, self.device).view(-1), 0
        for part in self._states.snapshot(snapshot):
            size = part.numel() * part.dtype.itemsize
            part.copy_(flat[at : at + size].clone().view(part.dtype).view(part.shape))  # a piece may begin anywhere
            at += size


class MemoryBlocks:
    """Blocks in host memory, page-locked where there is a GPU; on a CPU it is taken as it is filled."""

    def __init__(self, capacity: int, block_bytes: int, device: torch.device) -> None:
        shape = (capacity, block_bytes)
        if device.type == "cuda":
            self._slab = torch.empty(shape, dtype=torch.uint8, pin_memory=True)
        else:
            self._slab = untouched_zeros(shape, torch.uint8, device)
        self._free = list(range(capacity - 1, -1, -1))
        self._place: dict[bytes, int] = {}
        self._arrivals: dict[int, Arrival] = {}  # by place: of the last copy to it
        self._device = device

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def put(self, key: bytes, row: torch.Tensor) -> None:
        """Keep a block, whose row is on the device or the host; the books say that there is room."""
        if key not in self._place:
            self._place[key] = self._free.pop()
        place = self._place[key]
        if place in self._arrivals and row.device.type == "cpu":
            self._arrivals[place].wait()  # else a copy that is under way would write over the row
        self._slab[place].copy_(row, non_blocking=True)
        self._arrivals[place] = Arrival(self._device)

    def get(self, key: bytes) -> torch.Tensor:
        """The row of a block, which stays what it is until the block is dropped."""
        self._arrivals[self._place[key]].wait()
        return self._slab[self._place[key]]

    def drop(self, key: bytes) -> None:
        """Nothing where it is not there."""
        place = self._place.pop(key, None)
        if place is not None:
            self._free.append(place)

    def clear(self) -> None:
        for key in list(self._place):
            self.drop(key)
