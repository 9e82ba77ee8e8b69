"""Quantized weights, on every instruction set that this machine has."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.cpu.native.quantized import (
    BITS,
    INT4,
    INT6,
    INT8,
    LONG_ROWS_INT8,
    QuantizedRows,
    QuantizedWeight,
    Scheme,
    misfit,
    quantize,
    rounded,
)

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

SHAPES = [(96, 64), (100, 70), (1, 64), (288, 896)]  # of weights: (rows, columns)
ROWS = [1, 2, 3, 4, 7, 9, 17, 33, 65]
SCHEMES = [Scheme(bits, group, False, 1 << (bits - 1)) for bits in BITS for group in (16, 32)]
SCHEMES += [Scheme(bits, group, True) for bits in BITS for group in (16, 32)]
WIDE_INT6 = replace(INT6, scale_bits=16)
BYTES = [INT4, INT6, Scheme(5, 32, False, 16, scale_bits=8), Scheme(8, 32, False, 128, scale_bits=8)]  # as scales
SCHEMES += [LONG_ROWS_INT8, *BYTES]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


def random_numbers(rows: int, columns: int, scheme: Scheme) -> QuantizedRows:
    width = -(-columns // 32) * 32
    numbers = torch.randint(0, 1 << scheme.bits, (rows, width), dtype=torch.uint8)
    shape = rows, width // scheme.group_size
    if scheme.scale_bits == 8:
        least = 2.0 ** torch.randint(-20, -16, (rows,))
        parts, powers = torch.randint(0, 16, shape), torch.randint(0, 14, shape)
        scales = least.unsqueeze(1) * (1 + parts / 16) * 2.0**powers
        offsets = -scales * torch.randint(0, 256, shape) / 16 if scheme.offsets else None
        return QuantizedRows(scheme, numbers, scales, offsets, least)
    scales = (torch.rand(shape) / (1 << scheme.bits)).half().float()
    return QuantizedRows(scheme, numbers, scales, torch.randn(shape).half().float() if scheme.offsets else None)


def values_of(part: QuantizedRows, columns: int) -> torch.Tensor:
    """By the definition of the scheme, in float64."""
    scales = part.scales.double().repeat_interleave(part.scheme.group_size, 1)
    if part.offsets is None:
        return ((part.numbers.double() - part.scheme.zero_point) * scales)[:, :columns]
    return (part.numbers.double() * scales + part.offsets.double().repeat_interleave(part.scheme.group_size, 1))[
        :, :columns
    ]


def packed_weight(rows: int, columns: int, part: QuantizedRows) -> QuantizedWeight:
    weight = QuantizedWeight(rows, columns, part.scheme)
    weight.write(0, part, no_pause)
    return weight


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_rows_are_read_back_as_they_were_written(scheme, shape):
    part = random_numbers(*shape, scheme)
    weight = packed_weight(*shape, part)
    expected = values_of(part, shape[1]).bfloat16()
    assert torch.equal(weight.values(0, shape[0]), expected)
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(weight.read(ids), expected[ids])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_an_exact_product_has_the_bits_of_one_with_the_same_values_in_bfloat16(kernels, scheme):
    n, k = 100, 1096  # more columns than are expanded at once
    part = random_numbers(n, k, scheme)
    weight = packed_weight(n, k, part)
    packed = kernels.pack(weight.values(0, n), no_pause)
    for rows in ROWS:
        x, out, expected = torch.randn(rows, k).bfloat16(), torch.empty(rows, n), torch.empty(rows, n)
        kernels.product(x, packed, n, None, expected, "float")
        kernels.product(x, weight.argument(exact=True), n, None, out, "float")
        assert torch.equal(out, expected), rows


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_of_few_rows_differs_by_no_more_than_the_rounding_of_its_rows(kernels, scheme, shape):
    n, k = shape
    part = random_numbers(n, k, scheme)
    values = values_of(part, k)
    for rows in ROWS:
        x, out = torch.randn(rows, k).bfloat16(), torch.full((rows, n), torch.nan)
        kernels.product(x, packed_weight(n, k, part).argument(exact=False), n, None, out, "float")
        units = F.pad(x.double(), (0, -k % 32)).view(rows, -1, 32)
        largest = units.abs().amax(2, keepdim=True).expand_as(units).reshape(rows, -1)[:, :k]
        step = largest / (2 ** (scheme.row_bits - 1) - 1)
        bound = (0.5 * step) @ values.abs().T + (x.double().abs() @ values.abs().T) * 2**-8
        assert bool(((out.double() - x.double() @ values.T).abs() <= bound + 1e-5).all()), rows


def test_rows_that_a_weight_does_not_have_are_refused():
    weight = packed_weight(96, 64, random_numbers(96, 64, INT4))
    for ids in ([0, 96], [-1], [5, 1 << 40]):
        with pytest.raises(AssertionError, match="rows below 0 or not below 96"):
            weight.read(torch.tensor(ids))


@pytest.mark.parametrize("scheme", [INT8, INT4, LONG_ROWS_INT8], ids=str)
def test_rows_have_the_same_bits_by_any_number_of_threads(kernels, scheme):
    n, k = 1600, 200
    weight = packed_weight(n, k, random_numbers(n, k, scheme)).argument(exact=False)
    before = torch.get_num_threads()
    for rows in (1, 2, 3, 8):
        x, norm, outs = torch.randn(rows, k).bfloat16(), torch.rand(k).bfloat16(), []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outs.append(torch.full((rows, n), torch.nan))
            kernels.product(x, weight, n, None, outs[-1], "float", norm=(norm, 1e-6, 0.0))
        torch.set_num_threads(before)
        assert not outs[0].isnan().any() and all(torch.equal(out, outs[0]) for out in outs), rows


def available() -> list[Library]:
    """The kernels of every instruction set that this machine has."""
    found = []
    for name in INSTRUCTION_SETS:
        try:
            found.append(Library(library.functions(name), name))
        except LookupError:
            break
    return found


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_few_rows_have_the_same_bits_on_every_instruction_set(scheme):
    n, k = 100, 200
    weight = packed_weight(n, k, random_numbers(n, k, scheme)).argument(exact=False)
    for rows in (1, 2, 3, 4, 7, 8):
        x, outs = torch.randn(rows, k).bfloat16(), []
        for own in available():
            outs.append(torch.empty(rows, n))
            own.product(x, weight, n, None, outs[-1], "float")
        assert all(torch.equal(out, outs[0]) for out in outs), rows


@pytest.mark.parametrize("scheme", [s for s in SCHEMES if not s.offsets], ids=str)
@pytest.mark.parametrize("number", ["least", "most"])
@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_numbers_do_not_overflow_between_two_sums(kernels, scheme, number, sign):
    n, k = 32, 64
    own = 0 if number == "least" else (1 << scheme.bits) - 1
    numbers = torch.full((n, k), own, dtype=torch.uint8)
    scales = torch.ones(n, k // scheme.group_size)
    part = QuantizedRows(scheme, numbers, scales, None, torch.ones(n) / 8 if scheme.scale_bits == 8 else None)
    weight = packed_weight(n, k, part).argument(exact=False)
    for rows in (1, 2, 4):
        out = torch.empty(rows, n)
        kernels.product(torch.full((rows, k), sign * 127.0).bfloat16(), weight, n, None, out, "float")
        expected = torch.full((rows, n), sign * 127.0 * (own - scheme.zero_point) * k)
        torch.testing.assert_close(out, expected, rtol=0 if scheme.row_bits == 8 else 1e-6, atol=0)


@pytest.mark.parametrize("rows", [1, 5, 40])
@pytest.mark.parametrize("scheme", [INT8, INT4, LONG_ROWS_INT8], ids=str)
def test_norm_bias_gate_and_residual_are_those_of_a_plain_product(kernels, rows, scheme):
    quantized = packed_weight(64, 96, quantize((torch.randn(64, 96) / 8).bfloat16(), scheme))
    packed, weight = kernels.pack(quantized.values(0, 64), no_pause), quantized.argument(exact=False)
    x, bias, norm = torch.randn(rows, 96).bfloat16(), torch.randn(64).bfloat16(), torch.rand(96).bfloat16()
    for output, width in (("bf16", 64), ("add", 64), ("gated", 32), ("float", 64)):
        dtype = torch.float32 if output == "float" else torch.bfloat16
        ours, expected = torch.ones(rows, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
        kernels.product(x, weight, 64, bias, ours, output, "silu", (norm, 1e-6, 0.0))
        kernels.product(x, packed, 64, bias, expected, output, "silu", (norm, 1e-6, 0.0))
        torch.testing.assert_close(ours, expected, atol=0.08, rtol=0.05)


@pytest.mark.parametrize("rows", [1, 4, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("scheme", [INT8, LONG_ROWS_INT8], ids=str)
def test_a_row_that_is_no_number_stays_so(kernels, rows, value, scheme):
    weight = packed_weight(32, 64, quantize((torch.randn(32, 64) / 8).bfloat16(), scheme))
    x, out = torch.randn(rows, 64).bfloat16(), torch.zeros(rows, 32)
    x[-1, 5] = value
    kernels.product(x, weight.argument(exact=False), 32, None, out, "float")
    assert not torch.isfinite(out[-1]).any() and torch.isfinite(out[:-1]).all()


@pytest.mark.parametrize(("scheme", "size"), [(INT8, 1e-37), (LONG_ROWS_INT8, 1e-37), (LONG_ROWS_INT8, 2e-35)], ids=str)
def test_a_row_of_very_small_numbers_counts_for_nothing_and_breaks_nothing(kernels, scheme, size):
    """Beside them 127 / largest, or 32767 / largest, has no place in float32."""
    weight = packed_weight(32, 64, quantize((torch.randn(32, 64) / 8).bfloat16(), scheme))
    x, out = torch.randn(2, 64).bfloat16(), torch.full((2, 32), torch.nan)
    x[0] = size
    kernels.product(x, weight.argument(exact=False), 32, None, out, "float")
    assert out[0].abs().max() < 1e-30 and torch.isfinite(out[1]).all()


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_with_a_value_that_is_no_number_is_seen(scheme, value):
    for place in (0, 15, 16, 40, 63):
        weight = torch.randn(1, 64).bfloat16()
        weight[0, place] = value
        found = quantize(weight, scheme)
        assert not found.fits(), place
        group = place // scheme.group_size
        others = found.scales[0, [i for i in range(64 // scheme.group_size) if i != group]]
        assert torch.isfinite(others).all()


def test_int8_keeps_a_weight_within_half_a_step():
    weight = (torch.randn(48, 100) * 0.02).bfloat16()
    step = F.pad(weight.float(), (0, 28)).view(48, 4, 32).abs().amax(2) / 127
    difference = F.pad((rounded(weight, INT8).float() - weight.float()).abs(), (0, 28)).view(48, 4, 32)
    assert bool((difference <= step.unsqueeze(2) * 0.51 + weight.float().abs().max() * 2**-8).all())


def test_int4_has_a_smaller_error_than_the_step_between_least_and_largest():
    weight = (torch.randn(256, 256) * 0.02).bfloat16()
    groups = weight.float().view(256, 8, 32)
    least, largest = groups.amin(2, keepdim=True), groups.amax(2, keepdim=True)
    step = (largest - least) / 15
    plain = (((groups - least) / step).round() * step + least).view(256, 256)
    error = (rounded(weight, INT4).float() - weight.float()).square().mean()
    assert error < 0.95 * (plain - weight.float()).square().mean()


@pytest.mark.parametrize("scheme", [Scheme(5, 32, False, 16), WIDE_INT6, Scheme(4, 32, False, 8)], ids=str)
def test_few_bits_without_offsets_have_a_smaller_error_than_steps_up_to_the_largest_value(scheme):
    weight = (torch.randn(256, 256) * 0.02).bfloat16()
    groups = weight.float().view(256, 8, 32)
    step = groups.abs().amax(2, keepdim=True) / (scheme.zero_point - 1)
    plain = ((groups / step).round() * step).view(256, 256)
    error = (rounded(weight, scheme).float() - weight.float()).square().mean()
    assert error < 0.9 * (plain - weight.float()).square().mean()


@pytest.mark.parametrize("scheme", [Scheme(5, 32, False, 16), WIDE_INT6, Scheme(4, 32, False, 8)], ids=str)
@pytest.mark.parametrize("sign", [1, -1])
def test_few_bits_without_offsets_have_the_number_0_for_the_largest_value_of_either_sign(scheme, sign):
    numbers = torch.randint(0, 2 * scheme.zero_point, (16, 32))
    numbers[:, 3] = 0
    weight = (sign * 2.0**-9 * (numbers - scheme.zero_point)).bfloat16()
    assert torch.equal(rounded(weight, scheme), weight)
    assert torch.equal(quantize(weight, scheme).numbers, numbers.to(torch.uint8))


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(5, 16, False, 16), Scheme(6, 16, True)], ids=str)
@pytest.mark.parametrize("value", [0.0, 0.5, -3.0])
def test_a_weight_of_equal_numbers_stays_as_it_is(scheme, value):
    weight = torch.full((16, 32), value).bfloat16()
    torch.testing.assert_close(rounded(weight, scheme), weight, atol=0, rtol=2**-7)


@pytest.mark.parametrize("left", SCHEMES, ids=str)
@pytest.mark.parametrize("right", [INT8, INT4, Scheme(4, 16, False, 4)], ids=str)
def test_a_joined_form_holds_the_values_of_both(left, right):
    joined = left.joined(right)
    assert joined == right.joined(left) and joined.joined(left) == joined
    for scheme in (left, right):
        part = random_numbers(16, 64, scheme)
        assert torch.equal(values_of(part.to(joined), 64), values_of(part, 64))


@pytest.mark.parametrize("scheme", BYTES, ids=str)
@pytest.mark.parametrize("size", [0.02, 100.0])
def test_scales_of_a_byte_cost_little(scheme, size):
    """However far apart the groups of a row are: a scale's own step is a sixteenth of it, or less."""
    weight = (torch.randn(256, 256) * size * 4.0 ** -torch.arange(8).repeat_interleave(32)).bfloat16()
    error, plain = (
        (rounded(weight, own).double() - weight.double()).view(256, 8, 32).square().mean((0, 2))
        for own in (scheme, replace(scheme, scale_bits=16))
    )
    assert bool((error < 1.25 * plain).all()), error / plain


@pytest.mark.parametrize("scheme", BYTES, ids=str)
def test_scales_of_a_byte_lie_in_the_sixteen_powers_below_the_largest_of_a_row(scheme):
    weight = torch.randn(64, 128).bfloat16()
    weight[:, :32] *= 2.0**-40
    weight[3] = 0
    found = quantize(weight, scheme)
    assert found.least is not None
    steps = found.scales / found.least.unsqueeze(1)
    mantissas, powers = torch.frexp(steps)
    assert bool((steps >= 1).all() and (powers <= 16).all() and (mantissas * 32 == (mantissas * 32).round()).all())
    values = rounded(weight, scheme)
    assert not values[:, :32].any() and not values[3].any() and bool(values[:3, 32:].any(1).all())


def test_values_that_become_zeros_are_seen_with_scales_of_a_byte():
    weight = torch.full((1, 64), 1e-20).bfloat16()
    for scheme in (INT4, INT6):
        assert "too small" in misfit(weight, quantize(weight, scheme)), scheme
        assert misfit(torch.randn(1, 64).bfloat16(), quantize(torch.randn(1, 64).bfloat16(), scheme)) == ""
