"""The block formats of GGUF, expanded to float32 with operations of torch, on whatever device the bytes are.

Every function takes blocks as bytes, (blocks, bytes of one) uint8, and returns (blocks, values of one) float32. A block
holds integers of few bits, and one or more scales; its value is scale * number, minus an offset where the format
has one. The products are done in float32 in this order, so results are the same bits as those of ggml.
"""

from collections.abc import Callable

import torch

Expand = Callable[[torch.Tensor], torch.Tensor]

IQ4_NL_VALUES = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)


def halves(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The float16 number at a byte of each block. (blocks, 1) float32"""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def nibbles(packed: torch.Tensor) -> torch.Tensor:
    """(…, n) bytes → (…, 2, n): the low four bits of all, then the high ones."""
    return torch.stack((packed & 15, packed >> 4), -2)


def shifts(packed: torch.Tensor, step: int, count: int) -> torch.Tensor:
    """0, step, 2 * step … for shifting bytes, on their device."""
    return torch.arange(0, step * count, step, dtype=torch.uint8, device=packed.device)


def pairs_of_bits(packed: torch.Tensor) -> torch.Tensor:
    """(…, n) bytes → (…, 4, n): two bits each, the lowest of all first."""
    return (packed.unsqueeze(-2) >> shifts(packed, 2, 4).unsqueeze(1)) & 3


def bits(packed: torch.Tensor) -> torch.Tensor:
    """(…, n) bytes → (…, 8, n): single bits, the lowest of all first."""
    return (packed.unsqueeze(-2) >> shifts(packed, 1, 8).unsqueeze(1)) & 1


def fifth_bits(blocks: torch.Tensor, start: int) -> torch.Tensor:
    """The bit of each of 32 values, from four bytes, in place as the fifth. (blocks, 32) uint8"""
    every_byte = torch.arange(256, dtype=torch.uint8, device=blocks.device).view(-1, 1)
    table = (every_byte >> shifts(blocks, 1, 8) & 1) << 4  # looking bytes up is the fastest way
    return table.index_select(0, blocks[:, start : start + 4].flatten().int()).view(-1, 32)


def minus(numbers: torch.Tensor, zero: int) -> torch.Tensor:
    """QuantizedRows of at most seven bits with another zero. float32"""
    return (numbers.view(torch.int8) - zero).float()


def q4_0(blocks: torch.Tensor) -> torch.Tensor:
    return minus(nibbles(blocks[:, 2:]).flatten(1), 8).mul_(halves(blocks, 0))


def q4_1(blocks: torch.Tensor) -> torch.Tensor:
    return nibbles(blocks[:, 4:]).flatten(1).float().mul_(halves(blocks, 0)).add_(halves(blocks, 2))


def q5_0(blocks: torch.Tensor) -> torch.Tensor:
    numbers = nibbles(blocks[:, 6:]).flatten(1) | fifth_bits(blocks, 2)
    return minus(numbers, 16).mul_(halves(blocks, 0))


def q5_1(blocks: torch.Tensor) -> torch.Tensor:
    numbers = nibbles(blocks[:, 8:]).flatten(1) | fifth_bits(blocks, 4)
    return numbers.float().mul_(halves(blocks, 0)).add_(halves(blocks, 2))


def q8_0(blocks: torch.Tensor) -> torch.Tensor:
    return blocks[:, 2:].contiguous().view(torch.int8).float().mul_(halves(blocks, 0))


def iq4_nl(blocks: torch.Tensor) -> torch.Tensor:
    table = torch.tensor(IQ4_NL_VALUES, dtype=torch.float32, device=blocks.device)
    numbers = table.index_select(0, nibbles(blocks[:, 2:]).flatten().int()).view(-1, 32)
    return numbers.mul_(halves(blocks, 0))


def q2_k(blocks: torch.Tensor) -> torch.Tensor:
    """16 scales and offsets of 4 bits, 256 numbers of 2 bits, float16 scales of both."""
    scales, offsets = (part.float() for part in nibbles(blocks[:, :16]).unbind(1))  # (blocks, 16)
    numbers = pairs_of_bits(blocks[:, 16:80].view(-1, 2, 32)).reshape(-1, 16, 16).float()
    scale, offset = halves(blocks, 80) * scales, halves(blocks, 82) * offsets
    return numbers.mul_(scale.unsqueeze(2)).sub_(offset.unsqueeze(2)).flatten(1)


def q3_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 third bits, 256 numbers of 2 bits, 16 scales of 6 bits, a float16 scale of them."""
    low = pairs_of_bits(blocks[:, 32:96].view(-1, 2, 32)).reshape(-1, 8, 32)
    numbers = minus(low | bits(blocks[:, :32]) << 2, 4)  # a third bit that is not set takes four away
    high_of_scales = pairs_of_bits(blocks[:, 104:108]).flatten(1) << 4
    scale = halves(blocks, 108) * minus(nibbles(blocks[:, 96:104]).flatten(1) | high_of_scales, 32)
    return numbers.view(-1, 16, 16).mul_(scale.unsqueeze(2)).flatten(1)


def scales_of_6_bits(packed: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The 8 scales and 8 offsets of Q4_K and Q5_K. (blocks, 12) → twice (blocks, 8) float32"""
    first, second, rest = packed.view(-1, 3, 4).unbind(1)
    scales = torch.cat((first & 63, (rest & 15) | (first >> 6 << 4)), 1)
    offsets = torch.cat((second & 63, (rest >> 4) | (second >> 6 << 4)), 1)
    return scales.float(), offsets.float()


def scaled(blocks: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
    """QuantizedRows of Q4_K or Q5_K, (blocks, 8, 32) uint8, with their scales and offsets."""
    scales, offsets = scales_of_6_bits(blocks[:, 4:16].contiguous())
    scale, offset = halves(blocks, 0) * scales, halves(blocks, 2) * offsets
    return numbers.float().mul_(scale.unsqueeze(2)).sub_(offset.unsqueeze(2)).flatten(1)


def q4_k(blocks: torch.Tensor) -> torch.Tensor:
    return scaled(blocks, nibbles(blocks[:, 16:].view(-1, 4, 32)).reshape(-1, 8, 32))


def q5_k(blocks: torch.Tensor) -> torch.Tensor:
    low = nibbles(blocks[:, 48:].view(-1, 4, 32)).reshape(-1, 8, 32)
    return scaled(blocks, low | (bits(blocks[:, 16:48]) << 4))


def q6_k(blocks: torch.Tensor) -> torch.Tensor:
    """256 low nibbles and pairs of high bits, 16 scales of 8 bits, a float16 scale of them."""
    low = nibbles(blocks[:, :128].view(-1, 2, 64)).view(-1, 2, 4, 32)
    high = pairs_of_bits(blocks[:, 128:192].view(-1, 2, 32)) << 4
    scale = halves(blocks, 208) * blocks[:, 192:208].contiguous().view(torch.int8).float()
    return minus(low | high, 32).view(-1, 16, 16).mul_(scale.unsqueeze(2)).flatten(1)


EXPAND: dict[str, Expand] = {
    "Q4_0": q4_0,
    "Q4_1": q4_1,
    "Q5_0": q5_0,
    "Q5_1": q5_1,
    "Q8_0": q8_0,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": q4_k,
    "Q5_K": q5_k,
    "Q6_K": q6_k,
    "IQ4_NL": iq4_nl,
}
