"""The paged KV pool: how large it is, where it lies, and writing to it.

Keys and values of a layer are tensors (kv_heads, tokens, dim); page p owns the tokens [p * page_size, (p + 1) *
page_size) of every head. Page 0 is the null page: it holds zeros, no sequence owns it, padding reads it.
"""

import logging
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from quartet.kernels.cpu import addresses
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.process.memory import GB
from quartet.scheduler_service.host.device import available_gb, look_at_memory
from quartet.scheduler_service.host.pool_size import Need, Room, plan_pool
from quartet.scheduler_service.model.batch import AttentionSpec

log = logging.getLogger(__name__)

NULL_PAGE = 0


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that cost memory only where they are written to, on the CPU.

    `torch.zeros` would write every page at once. This is memory of its own, not the C library's: small pages, which are
    touched as they are filled, and which go back to the system when the tensor goes. Raises OSError where there is no
    room for as many addresses.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    if not size:
        return torch.zeros(shape, dtype=dtype)
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return torch.frombuffer(memory, dtype=dtype).view(shape)


@dataclass(slots=True)
class Placement:
    """Where a step's keys and values go."""

    slots: torch.Tensor  # (tokens,) int64
    begun: torch.Tensor | None = None  # pages that this step begins and does not fill; cleared first


class KVCache:
    """The pool of all layers."""

    def __init__(
        self,
        layers: Sequence[AttentionSpec],
        page_count: int,
        page_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count  # usable ones; the null page comes on top
        tokens = (page_count + 1) * page_size
        self._shapes = {spec.layer: (spec.kv_heads, tokens, spec.head_dim) for spec in layers}
        self._shared = [spec.layer for spec in layers if spec.values_are_keys]
        self._dtype, self._device = dtype, device
        self.allocate()

    def allocate(self) -> None:
        """Take the pool's memory, all zeros."""
        self.keys = {layer: self._pool(layer) for layer in self._shapes}
        self.values = {
            layer: self.keys[layer] if layer in self._shared else self._pool(layer) for layer in self._shapes
        }
        self.moved = addresses.moved()

    def _pool(self, layer: int) -> torch.Tensor:
        return untouched_zeros(self._shapes[layer], self._dtype, self._device)

    def release(self) -> None:
        """Give the pool's memory back; nothing may compute until `allocate`."""
        self.keys, self.values = {}, {}
        self.moved = addresses.moved()

    def write(self, layer: int, placement: Placement, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v (tokens, kv_heads, dim) in their places."""
        for pool, values in zip(self.pools(layer, placement), (k, v), strict=True):
            pool.index_copy_(1, placement.slots, values.transpose(0, 1))

    def pools(self, layer: int, placement: Placement) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer; pages that the step begins and does not fill are cleared."""
        pools = self.keys[layer], self.values[layer]
        if placement.begun is not None:
            for pool in pools:
                # What an earlier owner left must not reach anyone: a NaN survives every mask.
                by_page = pool.view(len(pool), -1, self.page_size * pool.shape[2])
                by_page.index_fill_(1, placement.begun, 0)
        return pools

    @property
    def gigabytes(self) -> tuple[float, float]:
        """Size of keys and of values."""
        own = {layer: pool for layer, pool in self.values.items() if layer not in self._shared}
        keys, values = (sum(x.nbytes for x in pool.values()) / GB for pool in (self.keys, own))
        return keys, values


def token_bytes(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """KV bytes of one token in all layers."""
    return sum((1 if s.values_are_keys else 2) * s.kv_heads * s.head_dim for s in layers) * dtype.itemsize


def make_kv_cache(
    config: ResolvedConfig,
    layers: Sequence[AttentionSpec],
    dtype: torch.dtype,
    device: torch.device,
    most_tokens: int,
    context_length: int,
    second_set_bytes: int,
    state_bytes: int = 0,
    sharing: int = 1,
) -> KVCache:
    """Size and allocate the pool for a model whose weights are loaded already. Raises StartupError.

    `most_tokens` is what all requests together can ever hold; a weight update takes `second_set_bytes`, recurrent
    states `state_bytes`. `sharing`: how many ranks take all of these from the same memory.
    """
    room = Room(look_at_memory(device), sharing * second_set_bytes)
    per_token = sharing * token_bytes(layers, dtype)
    need = Need(config.page_size, per_token, most_tokens, context_length, state_bytes)
    plan = plan_pool(config, need, room)
    try:
        cache = KVCache(layers, plan.page_count, plan.page_size, dtype, device)
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise StartupError(f"no room for a KV pool of {plan.tokens} tokens: {error}") from error
    log.info("KV Cache is allocated. #tokens: %d, K size: %.2f GB, V size: %.2f GB", plan.tokens, *cache.gigabytes)
    log.info("The KV pool's size is %s. Its memory is taken when it is first used.", plan.reason)
    log.info("Memory pool end. avail mem=%.2f GB", available_gb(device))
    return cache
