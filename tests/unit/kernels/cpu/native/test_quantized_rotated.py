"""Weights of 8 bits whose rows are rotated, on every instruction set that this machine has."""

import math

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.cpu.native.quantized import (
    FINE_ROTATED_INT8,
    INT8,
    ROTATED_INT8,
    QuantizedWeight,
    Scheme,
    quantize,
    rounded,
)

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

ROTATED = 128  # numbers that are rotated together
SCHEMES = [ROTATED_INT8, FINE_ROTATED_INT8]
SHAPES = [(96, 128), (100, 896), (33, 640), (40, 4864)]  # groups of 128; or 3 * 256 + 128; ...
IN_GROUPS = ["avx512_vnni", "avx512_bf16"]  # multiply rows in whole groups, however few
ROWS = [1, 2, 3, 7, 8, 9, 16, 17, 31, 33, 64, 65, 130, 700]


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


def rotated(x: torch.Tensor) -> torch.Tensor:
    """Each 128 numbers of a row times a Hadamard matrix, in float64."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    while len(matrix) < ROTATED:
        matrix = torch.cat([torch.cat([matrix, matrix], 1), torch.cat([matrix, -matrix], 1)])
    return (x.double().reshape(-1, ROTATED) @ matrix / math.sqrt(ROTATED)).view(x.shape)


def steps(x: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """What rounds each number of rotated rows: the largest of its group over 127."""
    blocks = x.shape[1] // ROTATED
    groups = -(-x.shape[1] // scheme.rotated)
    size = -(-blocks // groups) * ROTATED
    parts = [part.abs().amax(1, keepdim=True).expand_as(part) / 127 for part in x.split(size, 1)]
    return torch.cat(parts, 1)


def made(n: int, k: int, scheme: Scheme = ROTATED_INT8) -> tuple[torch.Tensor, QuantizedWeight]:
    weight = (torch.randn(n, k) * 0.02).bfloat16()
    quantized = QuantizedWeight(n, k, scheme)
    quantized.write(0, quantize(weight, scheme), no_pause)
    return weight, quantized


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_weight_stays_within_half_a_step_of_its_rotated_numbers(shape, scheme):
    weight, quantized = made(*shape, scheme)
    values = quantized.values(0, shape[0])
    difference = (rotated(values) - rotated(weight)).abs()
    rounding = weight.float().abs().max() * 2**-8 * math.sqrt(ROTATED)  # of the values to bfloat16
    assert bool((difference <= steps(rotated(weight), scheme) * 0.51 + rounding).all())
    error, plain = (values.double() - weight.double()).norm(), (rounded(weight, INT8).double() - weight.double()).norm()
    assert error < 1.7 * plain
    ids = torch.randint(0, shape[0], (9,))
    assert torch.equal(quantized.read(ids), values[ids])


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_differs_by_no_more_than_the_rounding_of_its_rows(kernels, shape, scheme):
    n, k = shape
    _, quantized = made(n, k, scheme)
    values = quantized.values(0, n).double()
    weights = rotated(values).abs()
    for rows in ROWS:
        x, out = torch.randn(rows, k).bfloat16(), torch.full((rows, n), torch.nan)
        x[:, :: k // 3] *= 20  # some numbers are much larger than the others, as in real models
        kernels.product(x, quantized.argument(exact=False), n, None, out, "float")
        bound = (0.51 * steps(rotated(x), scheme)) @ weights.T + (x.double().abs() @ values.abs().T) * 2**-8
        assert bool(((out.double() - x.double() @ values.T).abs() <= bound).all()), rows


@pytest.mark.parametrize("shape", SHAPES)
def test_an_exact_product_gives_a_row_the_same_bits_in_any_company(kernels, shape):
    n, k = shape
    _, quantized = made(n, k)
    x = torch.randn(max(ROWS), k).bfloat16()
    whole = torch.empty(len(x), n)
    kernels.product(x, quantized.argument(exact=True), n, None, whole, "float")
    for rows in ROWS[:-1]:
        out = torch.empty(rows, n)
        kernels.product(x[:rows], quantized.argument(exact=True), n, None, out, "float")
        assert torch.equal(out, whole[:rows]), rows
    expected = x.double() @ quantized.values(0, n).double().T
    assert (whole - expected).norm() < 0.006 * expected.norm()


def test_rows_have_the_same_bits_by_any_number_of_threads_and_rows_beside_them(kernels):
    n, k = 1600, 896
    weight = made(n, k)[1].argument(exact=False)
    before = torch.get_num_threads()
    for rows in (1, 2, 8, 40, 200):
        x, norm, outs = torch.randn(rows, k).bfloat16(), torch.rand(k).bfloat16(), []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            outs.append(torch.full((rows, n), torch.nan))
            kernels.product(x, weight, n, None, outs[-1], "float", norm=(norm, 1e-6, 0.0))
        torch.set_num_threads(before)
        assert not outs[0].isnan().any() and all(torch.equal(out, outs[0]) for out in outs), rows
        if rows == 200:  # many rows are multiplied in one way
            some = torch.empty(50, n)
            kernels.product(x[:50], weight, n, None, some, "float", norm=(norm, 1e-6, 0.0))
            assert torch.equal(some, outs[0][:50])


@pytest.mark.parametrize("in_groups", [False, True])
def test_few_rows_have_the_same_bits_on_every_instruction_set(in_groups):
    """Those without AMX that have VNNI give a scale to whole groups of a row, the others to 32 numbers."""
    n, k = 100, 896
    weight = made(n, k)[1].argument(exact=False)
    alike = [name for name in INSTRUCTION_SETS if in_groups == (name in IN_GROUPS)]
    for rows in (1, 2, 3, 4):
        x, outs = torch.randn(rows, k).bfloat16(), []
        for name in alike:
            try:
                own = Library(library.functions(name), name)
            except LookupError:
                continue
            outs.append(torch.empty(rows, n))
            own.product(x, weight, n, None, outs[-1], "float")
        if not outs:
            pytest.skip("this machine has none of them")
        assert all(torch.equal(out, outs[0]) for out in outs), rows


@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
@pytest.mark.parametrize("name", IN_GROUPS)
def test_rows_in_groups_have_the_same_bits_in_any_company(name, scheme):
    try:
        own = Library(library.functions(name), name)
    except LookupError:
        pytest.skip(f"this machine has no {name}")
    n, k = 100, 1280
    weight = made(n, k, scheme)[1].argument(exact=False)
    x = torch.randn(max(ROWS), k).bfloat16()
    whole = torch.empty(len(x), n)
    own.product(x, weight, n, None, whole, "float")
    for rows in ROWS[:-1]:
        out = torch.empty(rows, n)
        own.product(x[:rows], weight, n, None, out, "float")
        assert torch.equal(out, whole[:rows]), rows


@pytest.mark.parametrize("rows", [1, 5, 16, 40, 150])
@pytest.mark.parametrize("k", [256, 1280])
@pytest.mark.parametrize("scheme", SCHEMES, ids=str)
def test_norm_bias_gate_and_residual_are_those_of_a_plain_product(kernels, rows, k, scheme):
    quantized = made(64, k, scheme)[1]
    packed = kernels.pack(quantized.values(0, 64), no_pause)
    x, bias, norm = torch.randn(rows, k).bfloat16(), torch.randn(64).bfloat16(), torch.rand(k).bfloat16()
    for output, width in (("bf16", 64), ("add", 64), ("gated", 32), ("float", 64)):
        dtype = torch.float32 if output == "float" else torch.bfloat16
        ours, expected = torch.ones(rows, width, dtype=dtype), torch.ones(rows, width, dtype=dtype)
        kernels.product(x, quantized.argument(exact=False), 64, bias, ours, output, "silu", (norm, 1e-6, 0.5))
        kernels.product(x, packed, 64, bias, expected, output, "silu", (norm, 1e-6, 0.5))
        torch.testing.assert_close(ours, expected, atol=0.06, rtol=0.03)


@pytest.mark.parametrize("rows", [2, 16, 17, 40, 150, 700])
@pytest.mark.parametrize(("n", "k"), [(64, 256), (96, 896), (192, 1280)])
@pytest.mark.parametrize("activation", ["silu", "gelu_tanh"])
def test_a_gated_result_is_that_of_its_sums(kernels, rows, n, k, activation):
    weight = made(n, k)[1].argument(exact=False)
    x, half = torch.randn(rows, k).bfloat16(), n // 2
    sums = torch.empty(rows, n)
    kernels.product(x, weight, n, None, sums, "float")
    room = torch.full((rows + 2, half + 5), 7.0).bfloat16()
    kernels.product(x, weight, n, None, room[1:-1, 2 : half + 2], "gated", activation)
    act = F.silu(sums[:, :half]) if activation == "silu" else F.gelu(sums[:, :half], approximate="tanh")
    torch.testing.assert_close(room[1:-1, 2 : half + 2].float(), act * sums[:, half:], rtol=2**-7, atol=1e-5)
    room[1:-1, 2 : half + 2] = 7.0
    assert bool((room == 7.0).all()), "nothing else is written"


@pytest.mark.parametrize("rows", [1, 4, 12, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_no_number_stays_so(kernels, rows, value):
    quantized = made(32, 896)[1]
    x, out = torch.randn(rows, 896).bfloat16(), torch.zeros(rows, 32)
    x[-1, 555] = value
    kernels.product(x, quantized.argument(exact=False), 32, None, out, "float")
    assert not torch.isfinite(out[-1]).any() and torch.isfinite(out[:-1]).all()


@pytest.mark.parametrize("size", [1e-37, 0.0])
def test_rows_of_very_small_numbers_count_for_nothing_and_break_nothing(kernels, size):
    quantized = made(32, 256)[1]
    for rows in (2, 20):
        x, out = torch.randn(rows, 256).bfloat16(), torch.full((rows, 32), torch.nan)
        x[0] = size
        kernels.product(x, quantized.argument(exact=False), 32, None, out, "float")
        assert out[0].abs().max() < 1e-30 and torch.isfinite(out).all() and out[1:].abs().max() > 0


@pytest.mark.parametrize("sign", [-1, 1])
def test_the_largest_numbers_do_not_overflow(kernels, sign):
    """One number in each rotated block: all others are then as large as it is, in the row and in the weight."""
    n, k = 32, 1024
    weight, x = torch.zeros(n, k), torch.zeros(40, k)
    weight[:, ::ROTATED], x[:, ::ROTATED] = 1.0, sign * 3.0
    quantized = QuantizedWeight(n, k, ROTATED_INT8)
    quantized.write(0, quantize(weight.bfloat16(), ROTATED_INT8), no_pause)
    for rows in (1, 9, 40):
        out = torch.empty(rows, n)
        kernels.product(x[:rows].bfloat16(), quantized.argument(exact=False), n, None, out, "float")
        torch.testing.assert_close(out, torch.full((rows, n), sign * 3.0 * k / ROTATED), rtol=5e-3, atol=0)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_weight_with_a_value_that_is_no_number_is_seen(value):
    weight = torch.randn(2, 896).bfloat16()
    weight[1, 600] = value
    found = quantize(weight, ROTATED_INT8)
    assert not found.fits() and torch.isfinite(found.scales[0]).all() and torch.isfinite(found.scales[1, :2]).all()


def test_a_joined_form_is_rotated_only_where_both_are_the_same():
    assert ROTATED_INT8.joined(ROTATED_INT8) == ROTATED_INT8
    for other in (INT8, Scheme(4, 32, True), Scheme(6, 16, False, 32)):
        assert not ROTATED_INT8.joined(other).rotated and not other.joined(ROTATED_INT8).rotated
