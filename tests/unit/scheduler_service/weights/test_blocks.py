"""The block formats of GGUF: the same bits as a scalar description of each, and as the library of ggml's authors."""

import struct
from collections.abc import Callable, Iterator

import pytest
import torch

from quartet.runtime.model_files.gguf import TYPES
from quartet.scheduler_service.weights.blocks import EXPAND, IQ4_NL_VALUES

SIZES = {kind.name: (kind.values, kind.nbytes) for kind in TYPES.values()}
NUMBERS = {kind.name: number for number, kind in TYPES.items()}
HALVES = {  # where a block has float16 numbers, which must be finite
    "Q4_0": (0,),
    "Q4_1": (0, 2),
    "Q5_0": (0,),
    "Q5_1": (0, 2),
    "Q8_0": (0,),
    "IQ4_NL": (0,),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q4_K": (0, 2),
    "Q5_K": (0, 2),
    "Q6_K": (208,),
}
COUNT = 200


def random_blocks(name: str) -> torch.Tensor:
    """Blocks of any bits, whose scales are ordinary numbers. (COUNT, bytes of one) uint8"""
    generator = torch.Generator().manual_seed(1)
    blocks = torch.randint(0, 256, (COUNT, SIZES[name][1]), generator=generator, dtype=torch.uint8)
    for start in HALVES[name]:
        scales = torch.randn(COUNT, 1, generator=generator).half()
        blocks[:, start : start + 2] = scales.view(torch.uint8)
    return blocks


def half(block: bytes, start: int) -> float:
    return float(struct.unpack_from("<e", block, start)[0])


def single(value: float) -> float:
    """Rounded to float32, as each product and each difference is."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def simple(block: bytes, at: int, offset: int | None, high: int | None, minus: int) -> Iterator[float]:
    """32 numbers of 4 bits, with a fifth bit each where there are `high` ones."""
    for index in range(32):
        byte = block[at + index % 16]
        number = byte & 15 if index < 16 else byte >> 4
        if high is not None:
            number |= (block[high + index // 8] >> (index % 8) & 1) << 4
        product = single(half(block, 0) * (number - minus))
        yield product if offset is None else single(product + half(block, offset))


def q8_0(block: bytes) -> Iterator[float]:
    for number in struct.unpack_from("<32b", block, 2):
        yield single(half(block, 0) * number)


def iq4_nl(block: bytes) -> Iterator[float]:
    for index in range(32):
        byte = block[2 + index % 16]
        yield single(half(block, 0) * IQ4_NL_VALUES[byte & 15 if index < 16 else byte >> 4])


def two_bits(block: bytes, at: int, index: int) -> int:
    """The number of Q2_K and Q3_K: 128 values share 32 bytes, in four turns."""
    return block[at + index // 128 * 32 + index % 32] >> (index % 128 // 32 * 2) & 3


def q2_k(block: bytes) -> Iterator[float]:
    for index in range(256):
        both = block[index // 16]
        scale, offset = single(half(block, 80) * (both & 15)), single(half(block, 82) * (both >> 4))
        yield single(single(scale * two_bits(block, 16, index)) - offset)


def q3_k(block: bytes) -> Iterator[float]:
    for index in range(256):
        group = index // 16
        low = block[96 + group % 8] >> (4 if group >= 8 else 0) & 15
        scale = (low | (block[104 + group % 4] >> (group // 4 * 2) & 3) << 4) - 32
        number = two_bits(block, 32, index) - (0 if block[index % 32] >> (index // 32) & 1 else 4)
        yield single(single(half(block, 108) * scale) * number)


def six_bits(block: bytes, group: int) -> tuple[int, int]:
    """Scale and offset of one of the eight groups of Q4_K and Q5_K."""
    packed = block[4:16]
    if group < 4:
        return packed[group] & 63, packed[group + 4] & 63
    last = packed[group + 4]
    return last & 15 | packed[group - 4] >> 6 << 4, last >> 4 | packed[group] >> 6 << 4


def q45_k(block: bytes, at: int, high: int | None) -> Iterator[float]:
    for index in range(256):
        group = index // 32
        scale, offset = six_bits(block, group)
        number = block[at + index // 64 * 32 + index % 32] >> (index // 32 % 2 * 4) & 15
        if high is not None:
            number |= (block[high + index % 32] >> group & 1) << 4
        yield single(single(single(half(block, 0) * scale) * number) - single(half(block, 2) * offset))


def q6_k(block: bytes) -> Iterator[float]:
    scales = struct.unpack_from("<16b", block, 192)
    for index in range(256):
        part, turn, place = index // 128, index % 128 // 32, index % 32
        low = block[part * 64 + turn % 2 * 32 + place] >> (turn // 2 * 4) & 15
        number = (low | (block[128 + part * 32 + place] >> (turn * 2) & 3) << 4) - 32
        yield single(single(half(block, 208) * scales[index // 16]) * number)


SCALAR: dict[str, Callable[[bytes], Iterator[float]]] = {
    "Q4_0": lambda block: simple(block, 2, None, None, 8),
    "Q4_1": lambda block: simple(block, 4, 2, None, 0),
    "Q5_0": lambda block: simple(block, 6, None, 2, 16),
    "Q5_1": lambda block: simple(block, 8, 2, 4, 0),
    "Q8_0": q8_0,
    "IQ4_NL": iq4_nl,
    "Q2_K": q2_k,
    "Q3_K": q3_k,
    "Q4_K": lambda block: q45_k(block, 16, None),
    "Q5_K": lambda block: q45_k(block, 48, 16),
    "Q6_K": q6_k,
}


def test_every_block_format_that_is_read_is_expanded():
    assert EXPAND.keys() == SCALAR.keys() == {name for name, (values, _) in SIZES.items() if values > 1}


@pytest.mark.parametrize("name", EXPAND)
def test_blocks_are_expanded_to_the_bits_of_the_scalar_description(name):
    blocks = random_blocks(name)
    expected = torch.tensor([list(SCALAR[name](bytes(block.tolist()))) for block in blocks], dtype=torch.float32)
    assert EXPAND[name](blocks).shape == (COUNT, SIZES[name][0])
    assert torch.equal(EXPAND[name](blocks), expected)


@pytest.mark.parametrize("name", EXPAND)
def test_blocks_are_expanded_to_the_bits_of_the_gguf_package(name):
    quants = pytest.importorskip("gguf.quants", reason="the gguf package is not installed")
    blocks = random_blocks(name)
    expected = quants.dequantize(blocks.numpy(), quants.GGMLQuantizationType(NUMBERS[name]))
    assert torch.equal(EXPAND[name](blocks), torch.from_numpy(expected))


@pytest.mark.parametrize("name", EXPAND)
def test_a_slice_of_a_larger_memory_is_expanded_alike(name):
    blocks = random_blocks(name)
    memory = torch.zeros(blocks.numel() + 7, dtype=torch.uint8)
    memory[7:] = blocks.flatten()
    assert torch.equal(EXPAND[name](memory[7:].view(COUNT, -1)), EXPAND[name](blocks))
