"""Every layout gives back the numbers that a writer of its own has put into it."""

import pytest
import torch

from quartet.scheduler_service.weights.quantized import layouts

ROWS, COLUMNS, GROUP = 16, 64, 16
GROUPS = COLUMNS // GROUP


def packed_words(numbers: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, m) whole numbers → (n, m * bits / 32) int32, the first in the lowest bits, number by number."""
    per = 32 // bits
    words = torch.zeros(len(numbers), numbers.shape[1] // per, dtype=torch.int64)
    for place in range(per):
        words |= numbers[:, place::per].long() << (bits * place)
    return torch.where(words >= 1 << 31, words - (1 << 32), words).int()


def random_numbers(bits: int, *shape: int) -> torch.Tensor:
    return torch.randint(0, 1 << bits, shape, generator=torch.Generator().manual_seed(bits))


def random_scales(*shape: int) -> torch.Tensor:
    return (torch.rand(shape, generator=torch.Generator().manual_seed(9)) + 0.1).half()


def per_column(values: torch.Tensor, group_of: torch.Tensor | None = None) -> torch.Tensor:
    """(rows, groups) → (rows, columns)"""
    return values[:, torch.arange(COLUMNS) // GROUP if group_of is None else group_of]


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "added"), [(4, 1), (4, 0), (8, 1), (8, 0)])
def test_gptq_with_zero_points_minus_one_or_as_they_are_and_columns_in_any_order(bits, added, act_order):
    numbers, zeros = random_numbers(bits, ROWS, COLUMNS), random_numbers(bits, ROWS, GROUPS)
    scales = random_scales(ROWS, GROUPS)
    group_of = torch.arange(COLUMNS) // GROUP
    if act_order:
        group_of = group_of[torch.randperm(COLUMNS, generator=torch.Generator().manual_seed(3))]
    parts = {
        "qweight": packed_words(numbers, bits).T,
        "qzeros": packed_words((zeros.T - added) % (1 << bits), bits),
        "scales": scales.T,
        "g_idx": group_of.int(),
    }
    parts["qweight"] = packed_words(numbers, bits).T.contiguous()
    found = layouts.gptq(parts, bits, added)
    expected = per_column(scales.float(), group_of) * (numbers - per_column(zeros, group_of))
    assert torch.equal(found.values(), expected)
    assert (found.order is not None) == act_order


@pytest.mark.parametrize(("index", "said"), [(-1, "is not one of the 4"), (4, "is not one of"), (0, "16 columns each")])
def test_columns_of_groups_that_cannot_be_are_refused(index, said):
    group_of = torch.arange(COLUMNS) // GROUP
    group_of[-1] = index
    with pytest.raises(ValueError, match=said):
        layouts.column_order(group_of.int(), GROUPS, GROUP)


def test_awq_in_the_order_of_its_kernel():
    numbers, zeros = random_numbers(4, ROWS, COLUMNS), random_numbers(4, ROWS, GROUPS)
    scales = random_scales(ROWS, GROUPS)

    def stored(matrix: torch.Tensor) -> torch.Tensor:
        """(rows, n) → (n, rows / 8): nibble i of a word is the row that the published order names."""
        order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
        return packed_words(matrix.T.unflatten(1, (-1, 8))[:, :, order].flatten(1), 4)

    found = layouts.awq({"qweight": stored(numbers), "qzeros": stored(zeros), "scales": scales.T.contiguous()})
    assert torch.equal(found.values(), per_column(scales.float()) * (numbers - per_column(zeros)))


@pytest.mark.parametrize("shape", [(), (1,), (ROWS, 1)])
def test_float8_with_one_scale_or_one_a_row(shape):
    weight = torch.randn(ROWS, COLUMNS).to(torch.float8_e4m3fn)
    scale = torch.rand(shape)
    found = layouts.float8({"weight": weight, "weight_scale": scale}, "weight_scale")
    assert torch.equal(found, weight.float() * scale)


def test_float8_with_a_scale_for_every_block():
    weight = torch.randn(20, 40).to(torch.float8_e4m3fn)
    scale = torch.rand(3, 5)
    wide = scale.repeat_interleave(8, 0)[:20].repeat_interleave(8, 1)
    asked = {"weight": weight[11:], "weight_scale_inv": scale[1:]}
    found = layouts.float8_blocks(asked, "weight_scale_inv", (8, 8), 11 - 8)
    assert torch.equal(found, (weight.float() * wide)[11:])
