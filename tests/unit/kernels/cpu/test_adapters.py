"""What adapters add to products, on every instruction set that this machine has, against plain torch."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu import adapters
from quartet.kernels.cpu.adapters import AdapterWeights, add_float, additions, packed_addition, plain_addition
from quartet.kernels.cpu.linear import Linear, no_pause
from quartet.kernels.cpu.native import build, library, structures
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.cpu.native.quantized import INT4, INT8, ROTATED_INT8, QuantizedWeight, quantize

compiled = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

ROWS = [1, 2, 3, 7, 16, 17, 40, 65, 700]
SHAPES = {  # n, k of a weight, and of each part (first column, width, rank)
    "one part": (96, 64, [(0, 96, 16)]),
    "fused, of odd ranks": (224, 200, [(0, 128, 3), (128, 48, 40), (176, 48, 8)]),
    "not in blocks": (100, 70, [(5, 40, 5), (45, 55, 33)]),
    "wide": (64, 2100, [(32, 32, 64)]),
    "gated": (192, 96, [(0, 96, 16), (96, 96, 7)]),
    "of rotated blocks": (192, 640, [(0, 96, 16), (96, 96, 7)]),
}


class Made(NamedTuple):
    factors: list[adapters.Factors] | None  # None: nothing for this weight
    weights: AdapterWeights


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


def make(shape: str, dtype: torch.dtype, count: int = 3) -> list[Made]:
    """Adapters of other ranks each; the last one has nothing for the weight, which has the number 2."""
    made, (_, k, parts) = [], SHAPES[shape]
    for more in range(count - 1):
        factors = []
        for first, width, rank in parts:
            rank += more * 13
            a, b = torch.randn(rank, k) * k**-0.5, torch.randn(width, rank) * rank**-0.5
            factors.append((first, a.to(dtype), b.to(dtype)))
        made.append(Made(factors, AdapterWeights({2: packed_addition(factors)}, 4)))
    return [*made, Made(None, AdapterWeights({1: made[0].weights.additions[2]}, 4))]


def owners_of(rows: int, count: int = 3) -> torch.Tensor:
    """Runs of one adapter, and rows of all kinds among one another."""
    owners = torch.randint(-1, count, (rows,), dtype=torch.int32)
    owners[rows // 3 : rows // 3 + 20] = 0
    owners[rows // 3 + 20 : rows // 3 + 40] = 1
    return owners


def step_of(made: list[Made], owners: torch.Tensor) -> structures.Additions:
    return additions([one.weights for one in made], owners)


def expected(made: list[Made], owners: torch.Tensor, x: torch.Tensor, n: int) -> torch.Tensor:
    """What is added, in float64, with what is between the factors rounded as x is."""
    added = torch.zeros(len(x), n, dtype=torch.float64)
    for index, one in enumerate(made):
        rows = (owners == index).nonzero().flatten()
        for first, a, b in one.factors or []:
            inner = (x[rows].double() @ a.double().T).to(x.dtype).double()
            added[rows[:, None], torch.arange(first, first + len(b))] += inner @ b.double().T
    return added


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_a_product_has_what_the_adapters_of_its_rows_add(kernels, shape):
    n, k, _ = SHAPES[shape]
    weight, bias = (torch.randn(n, k) * k**-0.5).bfloat16(), torch.randn(n).bfloat16()
    packed, made = kernels.pack(weight, no_pause), make(shape, torch.bfloat16)
    for rows in ROWS:
        x, owners = torch.randn(rows, k).bfloat16(), owners_of(rows)
        out = torch.full((rows, n), torch.nan)
        kernels.product(x, packed, n, bias, out, "float", additions=step_of(made, owners), number=2)
        base = F.linear(x.double(), weight.double(), bias.double())
        # What is between the factors may be rounded the other way where a sum is near the middle: a few times in a row,
        # which moves the mean of three rows by 1e-4. Without that rounding it would be 1e-3.
        torch.testing.assert_close(out.double(), base + expected(made, owners, x, n), atol=2e-2, rtol=1e-4)
        assert (out.double() - base - expected(made, owners, x, n)).abs().mean() < 4e-4
        plain = torch.empty(rows, n)
        kernels.product(x, packed, n, bias, plain, "float")
        without = owners < 0
        assert torch.equal(out[without], plain[without]), "rows of the base have the same bits"
        assert torch.equal(out[owners == 2], plain[owners == 2]), "an adapter without factors changes nothing"


@compiled
@pytest.mark.parametrize("shape", ["fused, of odd ranks", "wide"])
def test_a_row_has_the_same_bits_whatever_adapters_the_rows_beside_it_have(kernels, shape):
    n, k, _ = SHAPES[shape]
    packed, made = kernels.pack((torch.randn(n, k) * k**-0.5).bfloat16(), no_pause), make(shape, torch.bfloat16)
    x, owners = torch.randn(300, k).bfloat16(), owners_of(300)
    whole = torch.empty(300, n)
    kernels.product(x, packed, n, None, whole, "float", additions=step_of(made, owners), number=2)
    for rows in ROWS[:-1]:
        some, own = torch.empty(rows, n), owners[7 : 7 + rows].clone()
        kernels.product(x[7 : 7 + rows], packed, n, None, some, "float", additions=step_of(made, own), number=2)
        assert torch.equal(some, whole[7 : 7 + rows]), rows
    for row in range(0, 300, 37):
        alone, adapter = torch.empty(1, n), int(owners[row])
        step = additions([made[adapter].weights], torch.zeros(1, dtype=torch.int32)) if adapter >= 0 else None
        kernels.product(x[row : row + 1], packed, n, None, alone, "float", additions=step, number=2)
        assert torch.equal(alone, whole[row : row + 1]), row


@compiled
@pytest.mark.parametrize("rows", [1, 5, 40])
def test_adapters_add_before_the_gate_and_behind_the_norm(kernels, rows):
    n, k, _ = SHAPES["gated"]
    weight, norm = (torch.randn(n, k) * k**-0.5).bfloat16(), torch.rand(k).bfloat16()
    made, owners = make("gated", torch.bfloat16), owners_of(rows)
    x, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n // 2, dtype=torch.bfloat16)
    step, normed = step_of(made, owners), torch.empty(rows, k, dtype=torch.bfloat16)
    kernels.product(x, kernels.pack(torch.eye(k).bfloat16(), no_pause), k, None, normed, "bf16", norm=(norm, 1e-6, 0.0))
    packed = kernels.pack(weight, no_pause)
    kernels.product(x, packed, n, None, out, "gated", norm=(norm, 1e-6, 0.0), additions=step, number=2)
    gate, up = (F.linear(normed.double(), weight.double()) + expected(made, owners, normed, n)).chunk(2, 1)
    torch.testing.assert_close(out.double(), F.silu(gate) * up, atol=3e-2, rtol=2**-7)
    added = x[:, :n].clone() if n <= k else torch.randn(rows, n).bfloat16()
    before = added.clone()
    kernels.product(x, packed, n, None, added, "add", additions=step, number=2)
    whole = before.double() + F.linear(x.double(), weight.double()) + expected(made, owners, x, n)
    torch.testing.assert_close(added.double(), whole, atol=3e-2, rtol=2**-7)


@compiled
@pytest.mark.parametrize("scheme", [INT4, INT8, ROTATED_INT8], ids=str)
@pytest.mark.parametrize("rows", [1, 3, 16, 40, 600])
def test_adapters_add_to_products_of_quantized_weights(kernels, scheme, rows):
    shape = "of rotated blocks" if scheme.rotated else "gated"
    n, k, _ = SHAPES[shape]
    weight = QuantizedWeight(n, k, scheme)
    weight.write(0, quantize((torch.randn(n, k) * 0.1).bfloat16(), scheme), no_pause)
    made, owners = make(shape, torch.bfloat16), owners_of(rows)
    x, plain, out = torch.randn(rows, k).bfloat16(), torch.empty(rows, n), torch.empty(rows, n)
    for exact in (False, True):
        kernels.product(x, weight.argument(exact), n, None, plain, "float")
        step = step_of(made, owners)
        kernels.product(x, weight.argument(exact), n, None, out, "float", additions=step, number=2)
        torch.testing.assert_close(out.double() - plain.double(), expected(made, owners, x, n), atol=2e-2, rtol=1e-3)
        assert torch.equal(out[owners < 0], plain[owners < 0])


@compiled
@pytest.mark.parametrize("shape", SHAPES)
def test_what_adapters_add_to_a_product_of_float32_is_that_of_torch(kernels, shape):
    n, k, _ = SHAPES[shape]
    made = make(shape, torch.float32)
    for rows in ROWS:
        x, owners, room = torch.randn(rows, k), owners_of(rows), torch.randn(rows, n + 9)
        before = room.clone()
        add_float(kernels, x, room[:, 3 : n + 3], step_of(made, owners), 2)
        whole = before[:, 3 : n + 3].double() + expected(made, owners, x, n)
        torch.testing.assert_close(room[:, 3 : n + 3].double(), whole, atol=2e-5, rtol=1e-5)
        assert torch.equal(room[:, :3], before[:, :3]) and torch.equal(room[:, n + 3 :], before[:, n + 3 :])
        row = rows // 2
        alone, own = before[row : row + 1, 3 : n + 3].clone(), owners[row : row + 1].clone()
        add_float(kernels, x[row : row + 1], alone, step_of(made, own), 2)
        assert torch.equal(alone, room[row : row + 1, 3 : n + 3]), "the same bits alone"


def test_without_kernels_torch_adds_the_same(monkeypatch):
    monkeypatch.setattr(library, "_loading", None)
    monkeypatch.setenv("QUARTET_CPU_ISA", "none")
    n, k, _ = SHAPES["fused, of odd ranks"]
    linear, x, owners = Linear(torch.randn(n, k)), torch.randn(17, k), owners_of(17)
    plain = linear(x)
    step = adapters.attach([(linear, "qkv", (0,))])
    assert step.kernels is None
    made = make("fused, of odd ranks", torch.float32)
    weights = [step.weights({("qkv", (0,)): one.factors} if one.factors else {}) for one in made]
    with step.of_step(weights, owners):
        torch.testing.assert_close((linear(x) - plain).double(), expected(made, owners, x, n), atol=1e-5, rtol=1e-5)
        step.select(torch.arange(4))
        torch.testing.assert_close(linear(x[:4]), linear(x[:4]))
    assert torch.equal(linear(x), plain), "between steps nothing is added"
    assert plain_addition(made[0].factors).width == n
