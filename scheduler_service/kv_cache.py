"""The paged KV pool: how large it is, where it lies, and writing to it.

Keys and values of a layer are tensors (kv_heads, tokens, dim); page p owns the tokens [p * page_size, (p + 1) *
page_size) of every head. Page 0 is the null page: it holds zeros, no sequence owns it, padding reads it.
"""

import logging
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy
import torch

from runtime.config import ServerConfig
from runtime.errors import StartupError
from scheduler_service.model.batch import AttentionSpec
from scheduler_service.weights.load import available_gb

log = logging.getLogger(__name__)

GB = 1 << 30
DEFAULT_SHARE = {"cpu": 0.4, "cuda": 0.85}  # of the memory that is free once the weights are loaded
LARGEST_SHARE = 0.95  # of it, for a size that the operator asked for
NULL_PAGE = 0
DEFAULT_PAGE_SIZE = 16


def untouched_zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Zeros that cost memory only where they are written to.

    On the CPU `torch.zeros` writes every page at once, gigabytes of them; the system's own zero pages cost nothing.
    """
    if device.type != "cpu":
        return torch.zeros(shape, dtype=dtype, device=device)
    size = math.prod(shape) * dtype.itemsize
    return torch.from_numpy(numpy.zeros(size, dtype=numpy.uint8)).view(dtype).view(shape)


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
        self._dtype, self._device = dtype, device
        self.allocate()

    def allocate(self) -> None:
        """Take the pool's memory, all zeros."""
        self.keys, self.values = (
            {layer: untouched_zeros(shape, self._dtype, self._device) for layer, shape in self._shapes.items()}
            for _ in range(2)
        )

    def release(self) -> None:
        """Give the pool's memory back; nothing may compute until `allocate`."""
        self.keys, self.values = {}, {}

    def write(self, layer: int, placement: Placement, k: torch.Tensor, v: torch.Tensor) -> None:
        """Put k and v (tokens, kv_heads, dim) in their places."""
        for pool, values in ((self.keys[layer], k), (self.values[layer], v)):
            if placement.begun is not None:
                # What an earlier owner left must not reach anyone: a NaN survives every mask.
                by_page = pool.view(len(pool), -1, self.page_size * pool.shape[2])
                by_page.index_fill_(1, placement.begun, 0)
            pool.index_copy_(1, placement.slots, values.transpose(0, 1))

    @property
    def gigabytes(self) -> tuple[float, float]:
        """Size of keys and of values."""
        keys, values = (sum(x.nbytes for x in pool.values()) / GB for pool in (self.keys, self.values))
        return keys, values


def token_bytes(layers: Sequence[AttentionSpec], dtype: torch.dtype) -> int:
    """KV bytes of one token in all layers."""
    return sum(2 * spec.kv_heads * spec.head_dim for spec in layers) * dtype.itemsize


def pages_that_fit(config: ServerConfig, bytes_per_page: int, free_bytes: int, total_bytes: int) -> int:
    """Pages that the memory share of the configuration holds, beside the weights that are loaded already."""
    if config.mem_fraction_static is None:
        kind = "cpu" if config.device == "cpu" else "cuda"
        budget = free_bytes * DEFAULT_SHARE[kind]
    else:
        budget = free_bytes - total_bytes * (1 - config.mem_fraction_static)
    return int(budget / bytes_per_page) - 1


def choose_page_count(
    config: ServerConfig, page_size: int, bytes_per_token: int, most_tokens: int, free_bytes: int, total_bytes: int
) -> int:
    """Usable pages of the pool. Raises StartupError when not one page fits.

    `most_tokens` is what all requests together can ever hold; more would lie idle.
    """
    if not bytes_per_token:  # an encoder keeps no KV: its pages are only counted
        return max(1, (config.max_total_tokens or most_tokens) // page_size)
    bytes_per_page = page_size * bytes_per_token
    fitting = pages_that_fit(config, bytes_per_page, free_bytes, total_bytes)
    if config.max_total_tokens is None:
        count = min(fitting, -(-most_tokens // page_size))
        advice = "free some memory or raise --mem-fraction-static"
    else:
        count = config.max_total_tokens // page_size
        largest = int(free_bytes * LARGEST_SHARE / bytes_per_page) - 1
        if count > largest:
            log.warning(
                "--max-total-tokens %d does not fit; the KV pool gets %d", count * page_size, largest * page_size
            )
            count = largest
        advice = f"--max-total-tokens must be at least the page size, {page_size}"
    if count < 1:
        raise StartupError(f"no room for a KV pool ({bytes_per_token} bytes per token): {advice}")
    return count


def make_kv_cache(
    config: ServerConfig,
    layers: Sequence[AttentionSpec],
    dtype: torch.dtype,
    device: torch.device,
    most_tokens: int,
    total_bytes: int,
) -> KVCache:
    """Size and allocate the pool for a model whose weights are loaded already."""
    page_size = config.page_size or DEFAULT_PAGE_SIZE
    free_bytes = int(available_gb(device) * GB)
    count = choose_page_count(config, page_size, token_bytes(layers, dtype), most_tokens, free_bytes, total_bytes)
    cache = KVCache(layers, count, page_size, dtype, device)
    log.info(
        "KV Cache is allocated. #tokens: %d, K size: %.2f GB, V size: %.2f GB", count * page_size, *cache.gigabytes
    )
    log.info("Memory pool end. avail mem=%.2f GB", available_gb(device))
    return cache
