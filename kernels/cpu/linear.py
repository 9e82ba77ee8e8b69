"""Linear layers by the fastest route of the device.

On the CPU that is a copy of the weight which oneDNN has packed once, for any number of rows. Medians in microseconds
on two cores, cycling through the layers of a model so that no matrix stays in a cache:

    matrix, rows          F.linear   oneDNN off   packed
    9728 x 896 bf16, 1         990          660      410
    151936 x 896 bf16, 1    33,000       16,300    9,900
    9728 x 896 bf16, 8       1,690        4,500      910
    9728 x 896 fp32, 1       2,500        2,300    1,270
    9728 x 896 fp32, 64     18,500            -    5,700

How many rows share a product may change the order of its sums, and so the last bits. Without AMX it does so for single
rows of some shapes only; such a row is computed twice in one product, which costs nothing: reading the weight takes
the time. With AMX, bfloat16 rows are added up in one way among 1 to 32 and in others among more. A layer that keeps
order (`keep_order`) multiplies only certain numbers of rows at once, for which a probe has found one order on this
machine: at most 64, with AMX 32. Without a packed form (bfloat16 without AVX-512) the same goes for `F.linear`.
One AVX-512 core takes, for 512 rows of 9728 x 896 (ms):

    fp32: whole 51, by 64 rows 54    bf16: 79, 79    bf16 with AMX: whole 7.5, by 32 rows 15, without AMX 79

bfloat16 has kernels of our own (native/), which give a row the same bits in any company and need none of this; the rest
is for float32, float16 and machines without a compiler.

float16 has no packed form on most CPUs: it is packed as float32, and single rows take `F.linear`.

A weight with very many rows, such as a language-model head, is packed in blocks of them, so that packing new values
while a model runs is never one long piece of work; concatenating the blocks' results costs little.
Smaller blocks would cost more: a product takes 0.1 ms however small it is.

oneDNN compiles and keeps a kernel of up to 2 MB for every number of rows that it meets, which takes it 1 to 9 ms each.
So rows are filled up to one of a few sizes (`row_size`), and no mix of prompt lengths makes a process grow.

A weight may be quantized (native/quantized.py): then our kernels read that form, and there is no other copy.

Memory: a packed copy takes as much as the weight (twice as much for float16). The weight itself stays: checkpoints
are read into it and compared with it. When its values have changed, `adopt(pack(weight))` follows.
"""

from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Protocol

import torch
import torch.nn.functional as F

from quartet.kernels.cpu import addresses
from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.quantized import QuantizedWeight
from quartet.kernels.cpu.native.structures import Additions, Quantized

PACKED_DTYPES = {torch.float32: torch.float32, torch.bfloat16: torch.bfloat16, torch.float16: torch.float32}
PACKED_FOR_ROWS = 64  # the hint to oneDNN that served 1 to 256 rows best
BLOCK_FEATURES = 16384  # rows of a weight that are packed in one go
ROW_COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)  # so many rows share a product where order is kept
SIZES_A_DOUBLING = 8  # numbers of rows that products are computed with, between one power of two and the next

Blocks = tuple[torch.Tensor, ...]  # of the weight's rows; packed, or as they are


def row_size(rows: int) -> int:
    """The number of rows that a product of so many is computed with: 1 to 8, 9, 10, ... 16, 18, ... 32, 36, ..."""
    step = max(1, (1 << (rows - 1).bit_length()) // (2 * SIZES_A_DOUBLING)) if rows > 1 else 1
    return -(-rows // step) * step


def no_pause() -> None:
    """What nobody waits for."""


class Adapters(Protocol):
    """What LoRA adapters add to the products of a step, see adapters.py."""

    @property
    def additions(self) -> Additions | None:
        """The same for our own kernels of bfloat16, which add to a product what they compute of it."""
        ...

    def add(self, linear: "Linear", x: torch.Tensor, y: torch.Tensor) -> None:
        """y (rows, out) += what the rows' adapters have for a layer's weight; x (rows, in)."""
        ...


class Linear:
    """x (rows, in) → x @ weight.T + bias (rows, out)."""

    is_whole = True  # False: other processes have parts of the weight, so only this object can compute the product

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None = None, quantized: QuantizedWeight | None = None
    ) -> None:
        """`quantized`: the weight, if it is kept so; then `weight` has only its shape."""
        self.weight = weight
        self.bias = bias
        self.packed: Blocks | None = None
        self.quantized = quantized
        self.keeps_order = False
        self.adapters: Adapters | None = None  # None: the server takes none
        self.number = 0  # under which adapters know the weight
        on_cpu = weight.device.type == "cpu"
        self.is_native = quantized is not None or (on_cpu and weight.dtype is torch.bfloat16 and native.is_expected())
        packable = self.is_native or (on_cpu and can_pack(weight.dtype))
        self.packed_dtype = PACKED_DTYPES[weight.dtype] if packable else None
        self.rows_unpacked = 1 if weight.dtype is torch.float16 else 0  # up to so many rows `F.linear` is faster
        self.least_rows = 1  # fewer are computed together with others, of zeros
        self.row_counts: tuple[int, ...] = ()  # where order is kept: ascending, no other numbers of rows are multiplied

    def __call__(self, x: torch.Tensor, gelu: bool = False) -> torch.Tensor:
        """`gelu`: of each number, on its way out of the product where the weight is packed."""
        if self.adapters is None or self.has_kernel:
            return self.product(x, gelu)
        y = self.product(x, False)
        self.adapters.add(self, x, y)
        return F.gelu(y) if gelu else y

    def product(self, x: torch.Tensor, gelu: bool) -> torch.Tensor:
        """The same; without what adapters add, where that is not for our own kernel."""
        if self.has_kernel:
            y = x.new_empty(len(x), len(self.weight))
            self.multiply_native(x, y, "bf16")
            return F.gelu(y) if gelu else y
        if self.packed is not None and len(self.packed) == 1 and x.dtype is self.packed_dtype and not self.row_counts:
            rows = len(x)  # the usual case, in few steps of Python: it counts where a step has one row
            if rows > self.rows_unpacked and rows >= self.least_rows and row_size(rows) == rows:
                return next(multiply(x, self.packed, self.bias, gelu))
        parts = list(self.products(x, gelu))
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def write(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """The same into `out` (rows, out), which may have another dtype, each part while it is in the cache."""
        if self.has_kernel and out.dtype is torch.float32:
            self.multiply_native(x, out, "float")
            return
        column = 0
        for part in self.products(x):
            out[:, column : column + part.shape[1]] = part
            column += part.shape[1]
        if self.adapters is not None:
            self.adapters.add(self, x, out)

    @property
    def additions(self) -> Additions | None:
        """What adapters add to a product by our own kernel."""
        return None if self.adapters is None else self.adapters.additions

    def multiply_native(
        self,
        x: torch.Tensor,
        out: torch.Tensor,
        output: str,
        activation: str = "silu",
        norm: native.NormWeight | None = None,
    ) -> None:
        """The product by our own kernel, adapters included, see native.Library.product."""
        kernels = native.library()
        assert kernels is not None and self.has_kernel
        weight, added = self.native_weight(), (self.additions, self.number)
        kernels.product(x, weight, len(self.weight), self.bias, out, output, activation, norm, *added)

    def native_weight(self) -> "torch.Tensor | Quantized":
        """The weight as our own kernels take it now; an update changes it."""
        if self.quantized is not None:
            return self.quantized.argument(self.keeps_order)
        assert self.packed is not None
        return self.packed[0]

    @property
    def has_kernel(self) -> bool:
        """Whether `multiply_native` can compute now."""
        return self.is_native and (self.packed is not None or self.quantized is not None)

    def products(self, x: torch.Tensor, gelu: bool = False) -> Iterator[torch.Tensor]:
        """The columns of the result, block by block of the weight."""
        rows = x.shape[0]
        if rows == 0 or not (self.row_counts or (self.packed is not None and rows > self.rows_unpacked)):
            plain = F.linear(x, self.weight, self.bias)
            yield F.gelu(plain) if gelu else plain
            return
        blocks, dtype = self.factors()
        x, sizes = x.to(dtype), self.sizes(rows)
        if (missing := sum(sizes) - rows) > 0:
            x = F.pad(x, (0, 0, 0, missing))
        bias = None if self.bias is None else self.bias.to(dtype)
        pieces = [multiply(piece, blocks, bias, gelu) for piece in x.split(sizes)]
        for parts in zip(*pieces, strict=True):
            part = parts[0] if len(parts) == 1 else torch.cat(parts)
            yield part[:rows].to(self.weight.dtype)

    def factors(self) -> tuple[Blocks, torch.dtype]:
        """The blocks of the weight to multiply with, packed ones where there are any, and their number format."""
        if self.packed is not None and self.packed_dtype is not None:
            return self.packed, self.packed_dtype
        return self.weight.split(BLOCK_FEATURES), self.weight.dtype

    def sizes(self, rows: int) -> list[int]:
        """The numbers of rows to multiply one after the other; in sum `rows` or more."""
        if not self.row_counts:
            return [max(row_size(rows), self.least_rows)]
        full, rest = divmod(rows, self.row_counts[-1])
        last = [count for count in self.row_counts if count >= rest][:1] if rest else []
        return [self.row_counts[-1]] * full + last

    def pack(self, weight: torch.Tensor, yield_point: Callable[[], None] = no_pause) -> Blocks | None:
        """The packed form of a weight of this layer's shape, or None where this device has none.

        `yield_point` is called after each block.
        """
        if self.quantized is not None:
            return None
        if self.is_native:
            if (kernels := native.library()) is not None:
                return (kernels.pack(weight, yield_point),)
            self.is_native = False  # it could not be compiled after all
            self.packed_dtype = weight.dtype if can_pack(weight.dtype) else None
        return None if self.packed_dtype is None else pack(weight, self.packed_dtype, yield_point)

    @property
    def packed_bytes(self) -> int:
        """Size of the packed form."""
        if self.quantized is not None or self.packed_dtype is None:
            return 0
        return self.weight.numel() * self.packed_dtype.itemsize

    def keep_order(self) -> None:
        """From now on the bits of a row do not depend on the other rows, for all shapes and dtypes; slower.

        Call after the weight was packed and the number of threads was set. Our own kernels keep order always, but for
        few rows and a quantized weight.
        """
        self.keeps_order = True
        addresses.moved()
        if self.is_native:
            return
        _, dtype = self.factors()
        kind = (self.weight.shape[1], dtype, self.packed is not None, torch.get_num_threads())
        ordered = [counts_in_order(height, *kind) for height in self.heights()]
        self.row_counts = tuple(sorted(set(ROW_COUNTS).intersection(*ordered))) or (1,)

    def heights(self) -> set[int]:
        """How many rows of the weight its blocks have."""
        return {len(block) for block in self.weight.split(BLOCK_FEATURES)}

    def adopt(self, packed: Blocks | None) -> None:
        """Use the result of `pack` for the weight's current values."""
        if packed is not None and self.packed is None and not self.is_native:
            self.least_rows = max(
                least_rows(height, self.weight.shape[1], self.packed_dtype) for height in self.heights()
            )
        self.packed = packed
        addresses.moved()


def pack(weight: torch.Tensor, dtype: torch.dtype, yield_point: Callable[[], None] = no_pause) -> Blocks:
    blocks = []
    for block in weight.split(BLOCK_FEATURES):
        blocks.append(torch.ops.mkldnn._reorder_linear_weight(block.to(dtype).contiguous(), PACKED_FOR_ROWS))
        yield_point()
    return tuple(blocks)


def multiply(x: torch.Tensor, blocks: Blocks, bias: torch.Tensor | None, gelu: bool = False) -> Iterator[torch.Tensor]:
    """The columns of x @ weight.T + bias, block by block, which are packed or not."""
    no_numbers: list[float] = []
    after = ("gelu", no_numbers, "none") if gelu else ("none", no_numbers, "")  # operation, numbers, approximation
    biases = [bias] * len(blocks) if bias is None or len(blocks) == 1 else bias.split(BLOCK_FEATURES)
    for block, its in zip(blocks, biases, strict=True):
        if block.is_mkldnn:
            yield torch.ops.mkldnn._linear_pointwise.default(x, block, its, *after)
        else:
            yield F.gelu(F.linear(x, block, its)) if gelu else F.linear(x, block, its)


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
    """1, or 2 where oneDNN adds up a single row of such a block in another order than a row among others."""
    blocks, row = order_probe(features, columns, dtype, packed=True)
    (single,), (pair,) = multiply(row, blocks, None), multiply(row.repeat(2, 1), blocks, None)
    return 1 if torch.equal(single, pair[:1]) else 2


@lru_cache
def counts_in_order(features: int, columns: int, dtype: torch.dtype, packed: bool, threads: int) -> tuple[int, ...]:
    """Those of ROW_COUNTS for which every row is added up in one order in products with such a block.

    Two rows set the order, or a single one where even two differ.
    """
    assert threads == torch.get_num_threads(), threads
    blocks, row = order_probe(features, columns, dtype, packed)
    results = {count: next(multiply(row.repeat(count, 1), blocks, None)) for count in ROW_COUNTS}
    standard = results[2][:1]
    return tuple(count for count, result in results.items() if bool((result == standard).all())) or (1,)


def order_probe(features: int, columns: int, dtype: torch.dtype, packed: bool) -> tuple[Blocks, torch.Tensor]:
    """One block of a weight and a row (1, columns) whose product shows in which order it was added up.

    Each number occurs once with its negative, in any places: what remains of a sum is its rounding.
    """
    generator, half = torch.Generator().manual_seed(0), columns // 2
    places = torch.randperm(columns, generator=generator)
    first, second = places[:half], places[half : 2 * half]
    weight, row = torch.zeros(features, columns), torch.zeros(1, columns)
    weight[:, first] = torch.rand(features, half, generator=generator) - 0.5
    row[:, first] = torch.rand(1, half, generator=generator) - 0.5
    weight[:, second], row[:, second] = weight[:, first], -row[:, first]
    weight = weight.to(dtype)
    return pack(weight, dtype) if packed else (weight,), row.to(dtype)
