"""The block formats of GGUF as integers with scales, for kernels that compute with them.

Every function takes blocks as bytes, (blocks, bytes of one) uint8, and returns the numbers (blocks, values) uint8, and
the scales and offsets (blocks, groups) float32. `FORMS` says what zero and group size they have. The values are those
of blocks.py; a kernel keeps scales as float16, to which the products of two scales in K-quants are rounded.
"""

from collections.abc import Callable

import torch

from quartet.kernels.cpu.native.quantized import QuantizedRows, Scheme
from quartet.scheduler_service.weights.blocks import (
    IQ4_NL_VALUES,
    bits,
    fifth_bits,
    halves,
    nibbles,
    pairs_of_bits,
    scales_of_6_bits,
)

Parts = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]  # numbers, scales, offsets


def q4_0(blocks: torch.Tensor) -> Parts:
    return nibbles(blocks[:, 2:]).flatten(1), halves(blocks, 0), None


def q4_1(blocks: torch.Tensor) -> Parts:
    return nibbles(blocks[:, 4:]).flatten(1), halves(blocks, 0), halves(blocks, 2)


def q5_0(blocks: torch.Tensor) -> Parts:
    return nibbles(blocks[:, 6:]).flatten(1) | fifth_bits(blocks, 2), halves(blocks, 0), None


def q5_1(blocks: torch.Tensor) -> Parts:
    return nibbles(blocks[:, 8:]).flatten(1) | fifth_bits(blocks, 4), halves(blocks, 0), halves(blocks, 2)


def q8_0(blocks: torch.Tensor) -> Parts:
    return blocks[:, 2:] ^ 128, halves(blocks, 0), None  # from signed to counted from 128


def iq4_nl(blocks: torch.Tensor) -> Parts:
    table = torch.tensor([value + 128 for value in IQ4_NL_VALUES], dtype=torch.uint8)
    return table.index_select(0, nibbles(blocks[:, 2:]).flatten().int()).view(-1, 32), halves(blocks, 0), None


def q2_k(blocks: torch.Tensor) -> Parts:
    scales, offsets = (part.float() for part in nibbles(blocks[:, :16]).unbind(1))
    numbers = pairs_of_bits(blocks[:, 16:80].view(-1, 2, 32)).flatten(1)
    return numbers, halves(blocks, 80) * scales, -halves(blocks, 82) * offsets


def q3_k(blocks: torch.Tensor) -> Parts:
    low = pairs_of_bits(blocks[:, 32:96].view(-1, 2, 32)).reshape(-1, 8, 32)
    scales = nibbles(blocks[:, 96:104]).flatten(1) | pairs_of_bits(blocks[:, 104:108]).flatten(1) << 4
    scale = halves(blocks, 108) * (scales.view(torch.int8) - 32).float()
    return (low | bits(blocks[:, :32]) << 2).flatten(1) + 4, scale, None  # an update may use all four bits


def with_6_bit_scales(blocks: torch.Tensor, numbers: torch.Tensor) -> Parts:
    """Of Q4_K and Q5_K."""
    scales, offsets = scales_of_6_bits(blocks[:, 4:16].contiguous())
    return numbers.flatten(1), halves(blocks, 0) * scales, -halves(blocks, 2) * offsets


def q4_k(blocks: torch.Tensor) -> Parts:
    return with_6_bit_scales(blocks, nibbles(blocks[:, 16:].view(-1, 4, 32)))


def q5_k(blocks: torch.Tensor) -> Parts:
    low = nibbles(blocks[:, 48:].view(-1, 4, 32)).reshape(-1, 8, 32)
    return with_6_bit_scales(blocks, low | (bits(blocks[:, 16:48]) << 4))


def q6_k(blocks: torch.Tensor) -> Parts:
    low = nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    high = pairs_of_bits(blocks[:, 128:192].view(-1, 2, 32)) << 4
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float()
    return (low | high).flatten(1), halves(blocks, 208) * scales, None


FORMATS: dict[str, tuple[Scheme, Callable[[torch.Tensor], Parts]]] = {
    "Q4_0": (Scheme(4, 32, offsets=False, zero_point=8), q4_0),
    "Q4_1": (Scheme(4, 32, offsets=True), q4_1),
    "Q5_0": (Scheme(5, 32, offsets=False, zero_point=16), q5_0),
    "Q5_1": (Scheme(5, 32, offsets=True), q5_1),
    "Q8_0": (Scheme(8, 32, offsets=False, zero_point=128), q8_0),
    "IQ4_NL": (Scheme(8, 32, offsets=False, zero_point=128), iq4_nl),
    "Q2_K": (Scheme(4, 16, offsets=True), q2_k),
    "Q3_K": (Scheme(4, 16, offsets=False, zero_point=8), q3_k),
    "Q4_K": (Scheme(4, 32, offsets=True), q4_k),
    "Q5_K": (Scheme(5, 32, offsets=True), q5_k),
    "Q6_K": (Scheme(6, 16, offsets=False, zero_point=32), q6_k),
}


def numbers_of(name: str, blocks: torch.Tensor, columns: int) -> QuantizedRows:
    """The rows of `columns` values that are in these blocks, (blocks, bytes of one) uint8."""
    scheme, function = FORMATS[name]
    numbers, scales, offsets = function(blocks)
    groups = columns // scheme.group_size
    return QuantizedRows(
        scheme,
        numbers.reshape(-1, columns),
        scales.reshape(-1, groups),
        None if offsets is None else offsets.reshape(-1, groups),
    )
