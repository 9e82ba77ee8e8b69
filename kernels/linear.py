"""Linear layers by the fastest route of the device.

On the CPU that is a copy of the weight which oneDNN has packed once, for any number of rows. Medians in microseconds
on two cores, cycling through the layers of a model so that no matrix stays in a cache:

    matrix, rows          F.linear   oneDNN off   packed
    9728 x 896 bf16, 1         990          660      410
    151936 x 896 bf16, 1    33,000       16,300    9,900
    9728 x 896 bf16, 8       1,690        4,500      910
    9728 x 896 fp32, 1       2,500        2,300    1,270
    9728 x 896 fp32, 64     18,500            -    5,700

A packed product also gives each row the same bits whatever rows are beside it, and for any number of threads, but
for single rows of some shapes; those are computed twice, side by side, which costs nothing: reading the weight is
what takes the time. So an answer does not depend on what else is in the batch.

float16 has no packed form on most CPUs: it is packed as float32, and single rows take `F.linear`.

A weight with very many rows, such as a language-model head, is packed in blocks of them, so that packing new values
beside a running model is never one long stretch of work; putting the blocks' results side by side costs little.
Smaller blocks would cost more: a product takes 0.1 ms however small it is.

Memory: a packed copy takes as much as the weight (twice as much for float16). The weight itself stays: checkpoints
are read into it and compared with it. When its values have changed, `adopt(pack(weight))` follows.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache

import torch
import torch.nn.functional as F

PACKED_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
PACKED_FOR_ROWS = 64  # the hint to oneDNN that served 1 to 256 rows best
BLOCK_FEATURES = 16384  # rows of a weight that are packed in one go

Packed = tuple[torch.Tensor, ...]  # one for each block of the weight's rows


def no_pause() -> None:
    """What nobody waits for."""


class Linear:
    """x (rows, in) → x @ weight.T + bias (rows, out)."""

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        self.weight = weight
        self.bias = bias
        self.packed: Packed | None = None
        packable = weight.device.type == "cpu" and can_pack(weight.dtype)
        self.packed_dtype = PACKED_DTYPES[weight.dtype] if packable else None
        self.rows_unpacked = 1 if weight.dtype is torch.float16 else 0  # up to so many rows `F.linear` is faster
        self.least_rows = 1  # fewer are computed together with copies of themselves

    def __call__(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """`gelu`: of each number, on its way out of the product where the weight is packed."""
        parts = list(self.products(x, gelu))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The same into `out` (rows, out), which may have another dtype, each part while it is in the cache."""
        column = 0
        for part in self.products(x):
            out[:, column : column + part.shape[1]] = part
            column += part.shape[1]

    def products(self, x: torch.Tensor, gelu: bool = False) -> Iterator[torch.Tensor]:
        """The columns of the result, block by block of the packed weight."""
        rows = x.shape[0]
        if self.packed is None or rows <= self.rows_unpacked:
            plain = F.linear(x, self.weight, self.bias)
            yield F.gelu(plain) if gelu else plain
            return
        x = x.to(self.packed_dtype)
        bias = None if self.bias is None else self.bias.to(self.packed_dtype)
        if rows < self.least_rows:
            x = x.expand(self.least_rows, -1)
        for part in multiply(x, self.packed, bias, gelu):
            yield part[:rows].to(self.weight.dtype)

    def pack(self, weight: torch.Tensor, breathe: Callable[[], None] = no_pause) -> Packed | None:
        """The packed form of a weight of this layer's shape, or None where this device has none.

        `breathe` is called after each block.
        """
        return None if self.packed_dtype is None else pack(weight, self.packed_dtype, breathe)

    def keep_order(self) -> None:
        """From now on a row gets the same bits whatever is beside it, for all shapes and dtypes, if not as fast."""
        self.rows_unpacked, self.least_rows = 0, 2

    def adopt(self, packed: Packed | None) -> None:
        """Use what `pack` made of the weight's present values."""
        if packed is not None and self.packed is None:
            heights = {len(block) for block in self.weight.split(BLOCK_FEATURES)}
            self.least_rows = max(least_rows(height, self.weight.shape[1], self.packed_dtype) for height in heights)
        self.packed = packed


def pack(weight: torch.Tensor, dtype: torch.dtype, breathe: Callable[[], None] = no_pause) -> Packed:
    blocks = []
    for block in weight.split(BLOCK_FEATURES):
        blocks.append(torch.ops.mkldnn._reorder_linear_weight(block.to(dtype).contiguous(), PACKED_FOR_ROWS))
        breathe()
    return tuple(blocks)


def multiply(x: torch.Tensor, packed: Packed, bias: torch.Tensor | None, gelu: bool = False) -> Iterator[torch.Tensor]:
    """The columns of x @ weight.T + bias, block by block."""
    after = ("gelu", [], "none") if gelu else ("none", [], "")  # operation, its numbers, its approximation
    biases = [None] * len(packed) if bias is None else bias.split(BLOCK_FEATURES)
    for block, its in zip(packed, biases, strict=True):
        yield torch.ops.mkldnn._linear_pointwise(x, block, its, *after)


@lru_cache
def can_pack(dtype: torch.dtype) -> bool:
    """Whether this build and this CPU multiply packed weights of a dtype."""
    if dtype not in PACKED_DTYPES or not torch.backends.mkldnn.is_available():
        return False
    ones = torch.ones(16, 16, dtype=PACKED_DTYPES[dtype])
    try:
        return all(bool((part == 16).all()) for part in multiply(ones, pack(ones, ones.dtype), None))
    except RuntimeError:  # oneDNN: this instruction set is missing
        return False


@lru_cache
def least_rows(features: int, columns: int, dtype: torch.dtype) -> int:
    """1, or 2 where oneDNN adds up a single row of such a block in another order than a row among others.

    The second half of each sum takes back what the first gave: what remains is the rounding, and that shows the order.
    """
    generator, half = torch.Generator().manual_seed(0), columns // 2
    weight, rows = torch.zeros(features, columns), torch.zeros(2, columns)
    weight[:, :half] = torch.rand(features, half, generator=generator) - 0.5
    rows[:, :half] = torch.rand(2, half, generator=generator) - 0.5
    weight[:, half : 2 * half], rows[:, half : 2 * half] = weight[:, :half], -rows[:, :half]
    rows = rows.to(dtype)
    packed = pack(weight.to(dtype), dtype)
    (alone,), (together,) = multiply(rows[:1], packed, None), multiply(rows, packed, None)
    return 1 if torch.equal(alone, together[:1]) else 2
