"""Mixtures of experts in the compiled kernels against plain torch, on every instruction set that this machine has."""

from dataclasses import replace

import pytest
import torch

from quartet.kernels.cpu.experts import Experts, ExpertsArgument
from quartet.kernels.cpu.linear import Linear, no_pause
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.cpu.native.quantized import INT4, INT8, ROTATED_INT8, QuantizedWeight, Scheme, quantize
from quartet.kernels.reference import layers as reference

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

HIDDEN, SIZE, SHARED, COUNT, TOP_K = 72, 48, 80, 6, 2
EPSILON = 1e-5


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request, monkeypatch):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


def linear(n: int, k: int) -> Linear:
    layer = Linear((torch.randn(n, k) * k**-0.5).bfloat16())
    layer.adopt(layer.pack(layer.weight))
    return layer


def mixture(**changes: object) -> Experts:
    torch.manual_seed(0)
    made = Experts(
        before=((torch.rand(HIDDEN) + 0.5).bfloat16(), EPSILON, 0.0),
        after=None,
        router=linear(COUNT, HIDDEN),
        gate_up=[linear(2 * SIZE, HIDDEN) for _ in range(COUNT)],
        down=[linear(HIDDEN, SIZE) for _ in range(COUNT)],
        shared=(linear(2 * SHARED, HIDDEN), linear(HIDDEN, SHARED)),
        shared_gate=linear(1, HIDDEN),
        activation="silu",
        top_k=TOP_K,
        renormalize=False,
    )
    return replace(made, **changes)


def expected(experts: Experts, residual: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same in float64, the ids, and what the router gives to each expert."""

    def normed(x: torch.Tensor, norm: library.NormWeight | None) -> torch.Tensor:
        if norm is None:
            return x
        return torch.nn.functional.rms_norm(x, x.shape[1:], norm[0].double() + norm[2], norm[1])

    def times(x: torch.Tensor, layer: Linear) -> torch.Tensor:
        return x @ layer.weight.double().T

    def block(x: torch.Tensor, gate_up: Linear, down: Linear) -> torch.Tensor:
        return times(reference.silu_and_mul(times(x, gate_up)), down)

    x = normed(residual.double(), experts.before)
    asked = x if experts.router_norm is None else normed(residual.double(), experts.router_norm)
    of_all = (times(asked, experts.router) * experts.router_scale).softmax(1)
    shares, ids = of_all.topk(experts.top_k)
    if experts.renormalize:
        shares = shares / shares.sum(1, keepdim=True)
    if experts.expert_scale is not None:
        shares = shares * experts.expert_scale.double()[ids]
    every = torch.stack([block(x, *pair) for pair in zip(experts.gate_up, experts.down, strict=True)], 1)
    y = (every.gather(1, ids.unsqueeze(2).expand(-1, -1, HIDDEN)) * shares.unsqueeze(2)).sum(1)
    y = normed(y, experts.after_chosen)
    if experts.shared is not None:
        inner = x if experts.shared_before is None else normed(residual.double(), experts.shared_before)
        shared = normed(block(inner, *experts.shared), experts.shared_after)
        y = y + (shared if experts.shared_gate is None else times(x, experts.shared_gate).sigmoid() * shared)
    return residual.double() + normed(y, experts.after), ids, of_all


def norm_weight() -> library.NormWeight:
    return (torch.rand(HIDDEN) + 0.5).bfloat16(), EPSILON, 0.0


VARIANTS = {
    "shared": {},
    "renormalized": {"renormalize": True, "shared": None, "shared_gate": None},
    "all of them": {"top_k": COUNT},
    "norms": {"after": (torch.rand(HIDDEN).bfloat16(), EPSILON, 1.0)},
    "no norm": {"before": None},
    "norms of parts": {
        **{name: norm_weight() for name in ("router_norm", "after", "after_chosen", "shared_before", "shared_after")},
        "renormalize": True,
        "shared_gate": None,
        "router_scale": 0.5,
        "expert_scale": (torch.rand(COUNT) + 0.5).bfloat16(),
    },
}


@pytest.mark.parametrize("rows", [1, 3, 70])
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_mixture_is_that_of_torch(kernels, variant, rows):
    experts = mixture(**VARIANTS[variant])
    residual = torch.randn(rows, HIDDEN).bfloat16()
    wanted, wanted_ids, shares = expected(experts, residual)
    ids = ExpertsArgument(experts).add(kernels, residual)
    torch.testing.assert_close(shares.gather(1, ids), shares.gather(1, wanted_ids), rtol=0.03, atol=0)  # of a near tie
    same = (ids == wanted_ids).all(1)
    assert same.float().mean() >= 0.9 or rows < 10
    torch.testing.assert_close(residual[same].double(), wanted[same], atol=0.04, rtol=2**-7)


def test_a_row_has_the_same_bits_whatever_rows_are_beside_it(kernels):
    argument = ExpertsArgument(mixture())
    rows = torch.randn(90, HIDDEN).bfloat16()
    whole = rows.clone()
    argument.add(kernels, whole)
    for first, last in ((0, 1), (5, 7), (20, 60)):
        some = rows[first:last].clone()
        argument.add(kernels, some)
        assert torch.equal(some, whole[first:last])


def quantized(layer: Linear, scheme: Scheme) -> Linear:
    """A layer with the same values in few bits, which keeps order."""
    own = QuantizedWeight(*layer.weight.shape, scheme)
    own.write(0, quantize(layer.weight, scheme), no_pause)
    made = Linear(layer.weight, quantized=own)
    made.keep_order()
    return made


@pytest.mark.parametrize("scheme", [INT8, INT4, Scheme(6, 16, False, 32), Scheme(5, 32, True)], ids=str)
def test_quantized_experts_that_keep_order_give_a_row_the_same_bits_in_any_company(kernels, scheme):
    plain = mixture()
    assert plain.shared is not None
    argument = ExpertsArgument(
        replace(
            plain,
            gate_up=[quantized(layer, scheme) for layer in plain.gate_up],
            down=[quantized(layer, scheme) for layer in plain.down],
            shared=(quantized(plain.shared[0], scheme), quantized(plain.shared[1], scheme)),
        )
    )
    rows = torch.randn(120, HIDDEN).bfloat16()
    whole = rows.clone()
    argument.add(kernels, whole)
    for first, last in ((0, 1), (5, 7), (30, 47), (20, 80)):
        some = rows[first:last].clone()
        argument.add(kernels, some)
        assert torch.equal(some, whole[first:last]), (first, last)


@pytest.mark.parametrize("keeps_order", [False, True])
def test_experts_with_rotated_weights_add_what_plain_ones_add(kernels, monkeypatch, keeps_order):
    for name, size in (("HIDDEN", 256), ("SIZE", 384), ("SHARED", 128)):  # whole rotated blocks
        monkeypatch.setitem(globals(), name, size)
    plain = mixture()
    assert plain.shared is not None

    def rotated(layer: Linear) -> Linear:
        made = quantized(layer, ROTATED_INT8)
        made.keeps_order = keeps_order
        return made

    gate_up, down = [rotated(layer) for layer in plain.gate_up], [rotated(layer) for layer in plain.down]
    shared = rotated(plain.shared[0]), rotated(plain.shared[1])
    for rows in (1, 5, 33, 200):
        x = torch.randn(rows, HIDDEN).bfloat16()
        expected, out = x.clone(), x.clone()
        ExpertsArgument(plain).add(kernels, expected)
        ExpertsArgument(replace(plain, gate_up=gate_up, down=down, shared=shared)).add(kernels, out)
        assert (out - expected).float().norm() < 0.03 * (expected - x).float().norm(), rows


def test_experts_that_keep_order_from_now_on_are_described_anew(kernels):
    plain = mixture(shared=None, shared_gate=None)
    layers = [quantized(layer, INT8) for layer in plain.gate_up]
    for layer in layers:
        layer.keeps_order = False
    argument = ExpertsArgument(replace(plain, gate_up=layers))
    assert not argument.fill().gate_up[0].quantized.exact
    for layer in layers:
        layer.keep_order()
    assert argument.fill().gate_up[0].quantized.exact


def test_rows_that_are_no_numbers_choose_experts_that_exist_and_stay_among_themselves(kernels):
    argument = ExpertsArgument(mixture())
    rows = torch.randn(5, HIDDEN).bfloat16()
    rows[2, 3] = torch.nan
    ids = argument.add(kernels, rows)
    assert ids.min() >= 0 and ids.max() < COUNT
    assert rows[2].isnan().all() and rows[[0, 1, 3, 4]].isfinite().all()


def test_new_values_of_a_weight_are_computed_with(kernels):
    experts = mixture()
    argument = ExpertsArgument(experts)
    rows = torch.randn(4, HIDDEN).bfloat16()
    argument.add(kernels, rows.clone())
    for layer in experts.down:
        layer.adopt(layer.pack(torch.zeros_like(layer.weight)))
    without = replace(experts, shared=None, shared_gate=None)
    found = rows.clone()
    ExpertsArgument(without).add(kernels, found)
    assert torch.equal(found, rows)
    found, again = rows.clone(), rows.clone()
    argument.add(kernels, found)
    ExpertsArgument(experts).add(kernels, again)
    assert torch.equal(found, again)


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("width", [64, 70, 5])
def test_a_normed_row_is_added_to_the_residual(kernels, width, rows):
    x, residual, weight = (torch.randn(*shape).bfloat16() for shape in ((rows, width), (rows, width), (width,)))
    wanted = residual + reference.rms_norm_plus_one(x, weight, EPSILON)
    kernels.add_normed(x, (weight, EPSILON, 1.0), residual)
    torch.testing.assert_close(residual, wanted, atol=2**-6, rtol=2**-7)


def test_parts_that_do_not_belong_together_are_refused():
    for change in ({"top_k": COUNT + 1}, {"router": linear(COUNT + 1, HIDDEN)}, {"down": mixture().down[1:]}):
        with pytest.raises(AssertionError):
            ExpertsArgument(mixture(**change))
