"""Rotations that are kept have the bits of those made alone."""

import pytest
import torch

from quartet.kernels.reference.layers import rotation
from quartet.scheduler_service.model.kept_rotations import MOST_BLOCKS, POSITIONS, KeptRotations


@pytest.mark.parametrize("count", [12, 32, 64])
def test_they_have_the_bits_of_rotations_made_alone(count):
    frequencies = 1e6 ** -(torch.arange(count) / count)

    def make(positions):
        return [
            rotation(positions, frequencies, 1.0, torch.bfloat16),
            rotation(positions, frequencies, 1.2, torch.bfloat16),
        ]

    kept = KeptRotations(make)
    for position in (0, 1, POSITIONS - 1, POSITIONS, 40_001, 1_000_003):
        for own, expected in zip(kept.at(position), make(torch.tensor([position])), strict=True):
            assert all(torch.equal(a, b) and a.is_contiguous() for a, b in zip(own, expected, strict=True)), position


def test_no_more_than_some_blocks_are_kept():
    made = []
    kept = KeptRotations(lambda positions: made.append(len(positions)) or [(positions, positions)])
    for block in range(3 * MOST_BLOCKS):
        (cos, _), *_ = kept.at(block * POSITIONS + 7)
        assert cos.tolist() == [block * POSITIONS + 7] and len(kept.blocks) <= MOST_BLOCKS
    assert made == [POSITIONS] * 3 * MOST_BLOCKS
