"""Recurrent layers by the CPU kernels against plain torch, on every instruction set that this machine has."""

import itertools
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quartet.kernels.cpu import recurrent
from quartet.kernels.cpu.native import build, library
from quartet.kernels.cpu.native.library import INSTRUCTION_SETS, Library
from quartet.kernels.cpu.recurrent import Beta, Convolution, Decay, Gates
from quartet.kernels.reference.layers import rms_norm
from quartet.kernels.reference.recurrent import causal_convolution, gated_delta_rule, state_space

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")

TOLERANCES = {torch.float32: 2e-5, torch.bfloat16: 2**-6}  # of results around 1
RUNS = [(0, 1, 1, 2), (1, 2, 3, 4), (2, 9, 0, 5), (9, 20, 5, 6), (20, 21, 6, 7), (21, 30, 8, 8)]
ROWS, TOKENS = 9, 30


@pytest.fixture(params=INSTRUCTION_SETS)
def kernels(request):
    try:
        return Library(library.functions(request.param), request.param)
    except LookupError:
        pytest.skip(f"this machine has no {request.param}")


@dataclass
class Layer:
    """A recurrence with its inputs and states."""

    heads: int
    key_heads: int
    key_dim: int
    value_dim: int
    dtype: torch.dtype = torch.float32
    taps: int = 4
    place: str = "by head"
    by_channel: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        torch.manual_seed(self.seed)
        self.values = self.heads * self.value_dim
        self.channels = self.values + 2 * self.key_heads * self.key_dim
        decays = self.heads * (self.key_dim if self.by_channel else 1)
        one_product = self.normal(TOKENS, self.channels + self.values)  # gates lie beside what they scale
        self.mixed, self.gate = one_product.split((self.channels, self.values), dim=-1)
        self.decay, self.beta = self.normal(TOKENS, decays), self.normal(TOKENS, self.heads)
        self.bias, self.log = self.normal(decays), torch.rand(self.heads)
        self.skip, self.convolution_bias = self.normal(self.heads), self.normal(self.channels)
        self.norm = None if self.place == "none" else 1 + self.normal(self.norm_size()) * 0.1
        self.weight = self.normal(self.channels, 1, self.taps) * 0.5
        self.window = self.normal(ROWS, self.taps - 1, self.channels)
        self.state = torch.randn(ROWS, self.heads, self.key_dim, self.value_dim)

    def norm_size(self) -> int:
        return self.value_dim if self.place == "by head" else self.values

    def normal(self, *shape: int) -> torch.Tensor:
        return torch.randn(*shape).to(self.dtype)

    def run(self, kernels: Library, runs: list[tuple[int, ...]] = RUNS, tokens: slice = slice(None)) -> torch.Tensor:
        """By the kernels; `tokens` of the inputs. States are changed."""
        own: dict[str, Any] = {
            "runs": torch.tensor(runs),
            "mixed": self.mixed[tokens],
            "convolution": Convolution(self.weight, self.convolution_bias, self.window),
            "decay": Decay(self.decay[tokens], self.bias, self.log),
            "states": self.state,
        }
        groups = self.heads if self.place == "by head" else self.key_heads
        gates = Gates(self.gate[tokens], self.norm, self.place, groups, 1e-5)
        if self.place == "by head":
            gates = replace(gates, is_sigmoid=self.by_channel)
            return recurrent.gated_delta(kernels, beta=Beta(self.beta[tokens], 1.5), gates=gates, **own)
        gates = replace(gates, factor=0.7)
        return recurrent.state_space(kernels, steps=(0.1, 1.1), skip=self.skip, gates=gates, **own)

    def expected(self) -> torch.Tensor:
        """In torch, run by run. States are changed."""
        out = torch.empty(TOKENS, self.values, dtype=self.dtype)
        for first, last, read, write in RUNS:
            mixed = self.mixed[first:last].unsqueeze(0)
            y, window = causal_convolution(
                mixed, self.window[read].unsqueeze(0), self.weight[:, 0], self.convolution_bias
            )
            y = F.silu(y.to(self.dtype).float()).to(self.dtype).float()
            one = slice(first, last)
            found, state = self.expected_scan(y, one, self.state[read].unsqueeze(0))
            self.window[write], self.state[write] = window[0], state[0]
            out[one] = self.expected_end(found[0], self.gate[one].float())
        return out

    def by_head(self, x: torch.Tensor, heads: int) -> torch.Tensor:
        return x.unflatten(-1, (heads, -1)).repeat_interleave(self.heads // heads, dim=2)

    def expected_scan(self, y: torch.Tensor, one: slice, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        keys = self.key_heads * self.key_dim
        steps = F.softplus(self.decay[one].float() + self.bias.float()).unsqueeze(0)
        rate = -self.log.exp().repeat_interleave(steps.shape[-1] // self.heads)
        if self.place == "by head":
            query, key, value = y.split((keys, keys, self.values), dim=-1)
            shaped = self.by_head(query, self.key_heads), self.by_head(key, self.key_heads)
            decay = (steps * rate).unflatten(-1, (self.heads, -1))
            beta = self.beta[one].float().sigmoid().unsqueeze(0) * 1.5
            return gated_delta_rule(*shaped, value.unflatten(-1, (self.heads, -1)), decay, beta, state)
        value, key, query = y.split((self.values, keys, keys), dim=-1)
        value, steps = value.unflatten(-1, (self.heads, -1)), steps.clamp(0.1, 1.1)
        shaped = self.by_head(key, self.key_heads), self.by_head(query, self.key_heads)
        found, state = state_space(value * steps.unsqueeze(-1), *shaped, steps * rate, state)
        return found + value * self.skip.float().unsqueeze(-1), state

    def expected_end(self, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        """Norm and gates: y (tokens, heads, value dim)."""
        if self.place == "by head":
            normed = rms_norm(y.to(self.dtype), self.norm, 1e-5).float().flatten(1)
            return (normed * (gate.sigmoid() if self.by_channel else F.silu(gate))).to(self.dtype)
        gates, y = F.silu(gate), y.flatten(1)
        if self.place == "none":
            return (y * gates * 0.7).to(self.dtype)
        grouped = (y * gates if self.place == "behind gates" else y).unflatten(-1, (self.key_heads, -1))
        normed = F.rms_norm(grouped, grouped.shape[-1:], None, 1e-5).flatten(1) * self.norm.float()
        return ((normed if self.place == "behind gates" else normed * gates) * 0.7).to(self.dtype)


DELTAS = [
    {"heads": 4, "key_heads": 2, "key_dim": 16, "value_dim": 8},
    {"heads": 2, "key_heads": 2, "key_dim": 24, "value_dim": 40, "by_channel": True, "taps": 3},
    {"heads": 3, "key_heads": 1, "key_dim": 128, "value_dim": 128},
    {"heads": 1, "key_heads": 1, "key_dim": 200, "value_dim": 96},
]
SPACES = [
    {"heads": 4, "key_heads": 2, "key_dim": 16, "value_dim": 12, "place": "behind gates"},
    {"heads": 6, "key_heads": 1, "key_dim": 256, "value_dim": 64, "place": "before gates"},
    {"heads": 2, "key_heads": 2, "key_dim": 9, "value_dim": 70, "place": "none", "taps": 2},
]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", DELTAS + SPACES, ids=str)
def test_layers_and_their_states_are_those_of_torch(kernels, shape, dtype):
    layer, reference = Layer(**shape, dtype=dtype), Layer(**shape, dtype=dtype)
    found, expected = layer.run(kernels), reference.expected()
    tolerance = TOLERANCES[dtype]
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(layer.state, reference.state, rtol=tolerance, atol=tolerance)
    assert torch.equal(layer.window, reference.window)


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("shape", [DELTAS[0], DELTAS[1], DELTAS[2], SPACES[0], SPACES[1]], ids=str)
def test_a_token_has_the_same_bits_in_any_chunk_and_company(kernels, shape, dtype):
    together, alone = Layer(**shape, dtype=dtype), Layer(**shape, dtype=dtype)
    whole = together.run(kernels)
    for first, last, read, write in RUNS:
        cuts = sorted({first, min(first + 1, last), (first + last) // 2, last})
        for begin, end in itertools.pairwise(cuts):
            part = alone.run(kernels, [(0, end - begin, read, write)], slice(begin, end))
            assert torch.equal(part, whole[begin:end]), (begin, end)
            read = write
    written = [write for *_, write in RUNS]
    assert torch.equal(alone.state[written], together.state[written])
    assert torch.equal(alone.window[written], together.window[written])


def test_the_result_does_not_depend_on_the_number_of_threads(kernels):
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            layer = Layer(**DELTAS[2])
            results.append((layer.run(kernels), layer.state, layer.window))
    finally:
        torch.set_num_threads(before)
    for one, *others in zip(*results, strict=True):
        assert all(torch.equal(one, other) for other in others)


def test_numbers_that_are_none_stay_with_their_sequence(kernels):
    for shape in (DELTAS[2], SPACES[1]):
        layer = Layer(**shape)
        layer.mixed[3] = torch.nan
        found = layer.run(kernels)
        assert found[3:21].isnan().all() and found[:3].isfinite().all() and found[21:].isfinite().all()
        assert layer.state[[2, 4, 8]].isfinite().all() and layer.state[[5, 6, 7]].isnan().all()


def test_rows_that_nobody_writes_keep_their_states(kernels):
    layer = Layer(**DELTAS[0])
    state, window = layer.state.clone(), layer.window.clone()
    layer.run(kernels)
    assert torch.equal(layer.state[[0, 1, 3]], state[[0, 1, 3]])
    assert torch.equal(layer.window[[0, 1, 3]], window[[0, 1, 3]])


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize("channels", [16, 40, 200])
def test_a_short_convolution_with_gates_is_that_of_torch(kernels, channels, dtype):
    torch.manual_seed(channels)
    product = torch.randn(TOKENS, 3 * channels).to(dtype)
    before, after, x = product.chunk(3, dim=-1)
    weight, window = torch.randn(channels, 1, 3).to(dtype), torch.randn(ROWS, 2, channels).to(dtype)
    expected, states = torch.empty(TOKENS, channels, dtype=dtype), window.clone()
    for first, last, read, write in RUNS:
        y, state = causal_convolution((before * x)[None, first:last], states[read][None], weight[:, 0], None)
        expected[first:last], states[write] = after[first:last] * y[0].to(dtype), state[0]
    parts = Convolution(weight, None, window)
    found = recurrent.short_convolution(kernels, torch.tensor(RUNS), x, before, after, parts)
    torch.testing.assert_close(found, expected, rtol=TOLERANCES[dtype], atol=TOLERANCES[dtype])
    assert torch.equal(window, states)


def test_what_the_kernels_do_not_know_is_said_before():
    assert recurrent.can_run(torch.float32, 4, 512) and recurrent.can_run(torch.bfloat16, 8)
    assert not recurrent.can_run(torch.float16, 4)
    assert not recurrent.can_run(torch.float32, 9)
    assert not recurrent.can_run(torch.float32, 4, 513)
