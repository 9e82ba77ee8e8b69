"""Recurrent layers by the compiled kernels (native/recurrent.h), in float32 or bfloat16; states are changed in place.

A token's bits depend neither on the tokens beside it nor on where a prompt is cut. Shapes are checked here: C code
trusts what it is given.

    runs    (runs, 4) int64: first and last token of each run, rows of the states in front of and behind it
"""

import ctypes
from dataclasses import dataclass
from typing import Literal

import torch

from quartet.kernels.cpu.native.library import Library

DTYPES = (torch.float32, torch.bfloat16)
MOST_TAPS, MOST_KEYS = 8, 512  # as recurrences.h has them
DELTA_RULE, STATE_SPACE = range(2)
NormPlace = Literal["by head", "behind gates", "before gates", "none"]
NORM_PLACES: tuple[NormPlace, ...] = ("by head", "behind gates", "before gates", "none")


class ConvolutionArgument(ctypes.Structure):
    """`struct convolution` of recurrences.h."""

    _fields_ = (
        ("x", ctypes.c_void_p),
        ("before", ctypes.c_void_p),
        ("after", ctypes.c_void_p),
        ("x_stride", ctypes.c_int64),
        ("weight", ctypes.c_void_p),
        ("bias", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("out", ctypes.c_void_p),
        ("channels", ctypes.c_int64),
        ("taps", ctypes.c_int64),
        ("is_float", ctypes.c_int32),
        ("activates", ctypes.c_int32),
        ("runs", ctypes.c_void_p),
        ("run_count", ctypes.c_int64),
        ("threads", ctypes.c_int32),
    )


class RecurrenceArgument(ctypes.Structure):
    """`struct recurrence` of recurrences.h."""

    _fields_ = (
        ("convolution", ConvolutionArgument),
        ("kind", ctypes.c_int32),
        ("tokens", ctypes.c_int64),
        ("heads", ctypes.c_int64),
        ("key_heads", ctypes.c_int64),
        ("key_dim", ctypes.c_int64),
        ("value_dim", ctypes.c_int64),
        ("query_at", ctypes.c_int64),
        ("key_at", ctypes.c_int64),
        ("value_at", ctypes.c_int64),
        ("decay", ctypes.c_void_p),
        ("decay_stride", ctypes.c_int64),
        ("decays", ctypes.c_int64),
        ("decay_bias", ctypes.c_void_p),
        ("decay_log", ctypes.c_void_p),
        ("beta", ctypes.c_void_p),
        ("beta_stride", ctypes.c_int64),
        ("beta_factor", ctypes.c_float),
        ("least_step", ctypes.c_float),
        ("most_step", ctypes.c_float),
        ("skip", ctypes.c_void_p),
        ("states", ctypes.c_void_p),
        ("kept", ctypes.c_void_p),
        ("rates", ctypes.c_void_p),
        ("y", ctypes.c_void_p),
        ("gate", ctypes.c_void_p),
        ("gate_stride", ctypes.c_int64),
        ("gate_is_sigmoid", ctypes.c_int32),
        ("norm_place", ctypes.c_int32),
        ("norm", ctypes.c_void_p),
        ("norm_size", ctypes.c_int64),
        ("epsilon", ctypes.c_float),
        ("out_factor", ctypes.c_float),
        ("out", ctypes.c_void_p),
    )


@dataclass(frozen=True, slots=True)
class Convolution:
    """A short causal convolution and the inputs that it has seen last."""

    weight: torch.Tensor  # (channels, …, taps)
    bias: torch.Tensor | None  # (channels,)
    states: torch.Tensor  # (rows, taps - 1, channels)


@dataclass(frozen=True, slots=True)
class Decay:
    """What states forget by: exp(-exp(log) * softplus(x + bias)), by head or by channel of keys."""

    x: torch.Tensor  # (tokens, heads), or as many for each as keys have channels
    bias: torch.Tensor  # as wide as x
    log: torch.Tensor  # (heads,) float32


@dataclass(frozen=True, slots=True)
class Beta:
    """How far what a state gives for a key moves towards the value: factor * sigmoid(x)."""

    x: torch.Tensor  # (tokens, heads)
    factor: float


@dataclass(frozen=True, slots=True)
class Gates:
    """Gates (tokens, values), and the norm before or behind them."""

    x: torch.Tensor
    norm: torch.Tensor | None
    place: NormPlace
    groups: int  # of values that are normed together
    epsilon: float
    is_sigmoid: bool = False  # else silu
    factor: float = 1.0  # of the result


def can_run(dtype: torch.dtype, taps: int, key_dim: int = 1) -> bool:
    """Whether the kernels know layers of this kind."""
    return dtype in DTYPES and 1 < taps <= MOST_TAPS and key_dim <= MOST_KEYS


def short_convolution(
    kernels: Library,
    runs: torch.Tensor,
    x: torch.Tensor,
    before: torch.Tensor,
    after: torch.Tensor,
    convolution: Convolution,
) -> torch.Tensor:
    """after * convolution(before * x): all (tokens, channels), columns of one product."""
    argument, out = described(runs, x, convolution, activates=False), x.new_empty(x.shape)
    for gate in (before, after):
        assert gate.shape == x.shape and gate.dtype is x.dtype and gate.stride() == x.stride(), gate.shape
    argument.before, argument.after, argument.out = before.data_ptr(), after.data_ptr(), out.data_ptr()
    run = kernels.functions.quartet_convolve
    if run.argtypes is None:
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.POINTER(ConvolutionArgument)), None
    run(kernels.kernels, argument)
    return out


def gated_delta(
    kernels: Library,
    runs: torch.Tensor,
    mixed: torch.Tensor,
    convolution: Convolution,
    decay: Decay,
    beta: Beta,
    states: torch.Tensor,
    gates: Gates,
) -> torch.Tensor:
    """The gated delta rule with what is around it: mixed (tokens, queries, keys and values) → (tokens, values).

    states (rows, heads, key dim, value dim) float32; the number of key heads follows from the width of `mixed`.
    """
    heads, key_dim, value_dim = states.shape[1:]
    keys = (mixed.shape[1] - heads * value_dim) // 2
    check_numbers(beta.x, len(mixed), heads, mixed.dtype)
    argument = recurrence(runs, mixed, convolution, decay, states, gates)
    argument.kind = DELTA_RULE
    argument.key_heads = keys // key_dim
    argument.query_at, argument.key_at, argument.value_at = 0, keys, 2 * keys
    argument.beta, argument.beta_stride, argument.beta_factor = beta.x.data_ptr(), beta.x.stride(0), beta.factor
    return call(kernels, argument, mixed, decay, states)


def state_space(
    kernels: Library,
    runs: torch.Tensor,
    mixed: torch.Tensor,
    convolution: Convolution,
    decay: Decay,
    steps: tuple[float, float],
    skip: torch.Tensor,
    states: torch.Tensor,
    gates: Gates,
) -> torch.Tensor:
    """The state space of Mamba-2 with what is around it: mixed (tokens, values, keys and queries) → (tokens, values).

    `steps`: the least and the most; skip (heads,): what values are added to the result by; states as `gated_delta`'s.
    """
    heads, key_dim, value_dim = states.shape[1:]
    values = heads * value_dim
    keys = (mixed.shape[1] - values) // 2
    assert decay.x.shape[1] == heads, (decay.x.shape, heads)
    check_weight(skip, (heads,), mixed.dtype)
    argument = recurrence(runs, mixed, convolution, decay, states, gates)
    argument.kind = STATE_SPACE
    argument.key_heads = keys // key_dim
    argument.value_at, argument.key_at, argument.query_at = 0, values, values + keys
    argument.least_step, argument.most_step = steps
    argument.skip = skip.data_ptr()
    return call(kernels, argument, mixed, decay, states)


def described(runs: torch.Tensor, x: torch.Tensor, convolution: Convolution, activates: bool) -> ConvolutionArgument:
    """A convolution as the kernels take it, without memory for its result."""
    channels = x.shape[1]
    weight, bias, states = convolution.weight, convolution.bias, convolution.states
    taps = weight.shape[-1]
    assert can_run(x.dtype, taps) and x.stride(1) == 1, (x.dtype, taps, x.stride())
    check_weight(weight, weight.shape, x.dtype)
    assert weight.numel() == channels * taps, (weight.shape, channels)
    assert states.shape[1:] == (taps - 1, channels) and states.dtype is x.dtype and states.is_contiguous()
    if bias is not None:
        check_weight(bias, (channels,), x.dtype)
    assert runs.dtype is torch.int64 and runs.shape[1] == 4 and runs.is_contiguous(), (runs.dtype, runs.shape)
    return ConvolutionArgument(
        x=x.data_ptr(),
        x_stride=x.stride(0),
        weight=weight.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        states=states.data_ptr(),
        channels=channels,
        taps=taps,
        is_float=x.dtype is torch.float32,
        activates=activates,
        runs=runs.data_ptr(),
        run_count=len(runs),
        threads=torch.get_num_threads(),
    )


def recurrence(
    runs: torch.Tensor,
    mixed: torch.Tensor,
    convolution: Convolution,
    decay: Decay,
    states: torch.Tensor,
    gates: Gates,
) -> RecurrenceArgument:
    """What both kinds of recurrences have in common, without memory of its own."""
    tokens, channels = mixed.shape
    rows, heads, key_dim, value_dim = states.shape
    values, decays = heads * value_dim, decay.x.shape[1] // heads
    keys = channels - values
    assert states.dtype is torch.float32 and states.is_contiguous(), (states.dtype, states.stride())
    assert len(convolution.states) == rows and key_dim <= MOST_KEYS, (convolution.states.shape, states.shape)
    assert keys > 0 and keys % (2 * key_dim) == 0 and heads % (keys // (2 * key_dim)) == 0, (channels, states.shape)
    assert decays in (1, key_dim), (decay.x.shape, states.shape)
    check_numbers(decay.x, tokens, heads * decays, mixed.dtype)
    check_weight(decay.bias, (heads * decays,), mixed.dtype)
    assert decay.log.numel() == heads and decay.log.dtype is torch.float32 and decay.log.is_contiguous()
    check_numbers(gates.x, tokens, values, mixed.dtype)
    size = values // gates.groups
    if gates.norm is not None:
        check_weight(gates.norm, (size if gates.place == "by head" else values,), mixed.dtype)
    assert (gates.norm is None) == (gates.place == "none") and values % gates.groups == 0, gates.place
    return RecurrenceArgument(
        convolution=described(runs, mixed, convolution, activates=True),
        tokens=tokens,
        heads=heads,
        key_dim=key_dim,
        value_dim=value_dim,
        decay=decay.x.data_ptr(),
        decay_stride=decay.x.stride(0),
        decays=decays,
        decay_bias=decay.bias.data_ptr(),
        decay_log=decay.log.data_ptr(),
        states=states.data_ptr(),
        gate=gates.x.data_ptr(),
        gate_stride=gates.x.stride(0),
        gate_is_sigmoid=gates.is_sigmoid,
        norm_place=NORM_PLACES.index(gates.place),
        norm=None if gates.norm is None else gates.norm.data_ptr(),
        norm_size=size,
        epsilon=gates.epsilon,
        out_factor=gates.factor,
    )


def call(
    kernels: Library, argument: RecurrenceArgument, mixed: torch.Tensor, decay: Decay, states: torch.Tensor
) -> torch.Tensor:
    """Run a recurrence in memory that is made here: (tokens, values)."""
    tokens, heads, values = len(mixed), states.shape[1], states.shape[1] * states.shape[3]
    convolved, out = mixed.new_empty(mixed.shape), mixed.new_empty(tokens, values)
    kept, rates, y = (states.new_empty(tokens, width) for width in (decay.x.shape[1], heads, values))
    argument.convolution.out, argument.out = convolved.data_ptr(), out.data_ptr()
    argument.kept, argument.rates, argument.y = kept.data_ptr(), rates.data_ptr(), y.data_ptr()
    run = kernels.functions.quartet_recur
    if run.argtypes is None:
        run.argtypes, run.restype = (ctypes.c_void_p, ctypes.POINTER(RecurrenceArgument)), None
    run(kernels.kernels, argument)
    return out


def check_numbers(x: torch.Tensor, tokens: int, width: int, dtype: torch.dtype) -> None:
    """Raise AssertionError unless x is (tokens, width) of the model's numbers, whose rows are contiguous."""
    assert x.shape == (tokens, width) and x.dtype is dtype and (x.stride(1) == 1 or width == 1), (x.shape, x.dtype)


def check_weight(weight: torch.Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """The same for a weight as it lies in memory."""
    assert weight.shape == shape and weight.dtype is dtype and weight.is_contiguous(), (weight.shape, weight.dtype)
