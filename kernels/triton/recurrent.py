"""Decode steps of recurrent layers: each program takes one token through a part of one sequence's state.

    convolve_row    (row, block of channels)
    delta_update    (row, head, block of the state's columns), which do not know of one another
    space_update    the same

The state is read once and written once: that is what takes the time.
"""

import torch
import triton
import triton.language as tl

from quartet.kernels.triton.common import blocks, options, power_of_two
from quartet.kernels.triton.compile import kernel
from quartet.kernels.triton.configs import STATE_BLOCK, tile


def convolve_row(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activates: bool,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.convolve_row."""
    chosen = tile("convolve_row")
    rows, channels = x.shape
    grid = (rows, blocks(channels, chosen.columns))
    taps = weight.shape[1]
    _convolve_row[grid](
        x,
        weight,
        bias,
        reads,
        writes,
        states,
        out,
        x.stride(0),
        channels,
        taps,
        chosen.columns,
        activates,
        **options(chosen),
    )


def delta_update(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.delta_update."""
    chosen = tile("state_update")
    rows, channels = mixed.shape
    heads, key_dim, value_dim = states.shape[1:]
    keys = (channels - heads * value_dim) // 2
    columns = state_columns(key_dim, value_dim)
    _delta_update[(rows, heads, blocks(value_dim, columns))](
        mixed,
        decay,
        beta,
        reads,
        writes,
        states,
        out,
        mixed.stride(0),
        key_dim**-0.5,
        heads,
        keys,
        key_dim,
        value_dim,
        decay.shape[1] // heads,
        power_of_two(key_dim),
        columns,
        **options(chosen),
    )


def space_update(
    mixed: torch.Tensor,
    decay: torch.Tensor,
    steps: torch.Tensor,
    skip: torch.Tensor,
    reads: torch.Tensor,
    writes: torch.Tensor,
    states: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """See kernels.recurrent_operations.RecurrentOps.space_update."""
    chosen = tile("state_update")
    rows, channels = mixed.shape
    heads, key_dim, value_dim = states.shape[1:]
    keys = (channels - heads * value_dim) // 2
    columns = state_columns(key_dim, value_dim)
    _space_update[(rows, heads, blocks(value_dim, columns))](
        mixed,
        decay,
        steps,
        skip,
        reads,
        writes,
        states,
        out,
        mixed.stride(0),
        heads,
        keys,
        key_dim,
        value_dim,
        power_of_two(key_dim),
        columns,
        **options(chosen),
    )


def state_columns(key_dim: int, value_dim: int) -> int:
    """Columns of a state that one program takes: more numbers would not stay in the registers."""
    return min(tile("state_update").columns, power_of_two(value_dim), STATE_BLOCK // power_of_two(key_dim))


@kernel
def _convolve_row(
    x_ptr,
    weight_ptr,
    bias_ptr,
    reads_ptr,
    writes_ptr,
    states_ptr,
    out_ptr,
    x_stride,
    CHANNELS: tl.constexpr,
    TAPS: tl.constexpr,
    BLOCK: tl.constexpr,
    ACTIVATES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    channels = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = channels < CHANNELS
    before_ptr = states_ptr + tl.load(reads_ptr + row) * ((TAPS - 1) * CHANNELS) + channels
    behind_ptr = states_ptr + tl.load(writes_ptr + row) * ((TAPS - 1) * CHANNELS) + channels
    own = tl.load(x_ptr + row * x_stride + channels, mask, 0.0)
    y = tl.zeros((BLOCK,), tl.float32)
    for tap in tl.static_range(TAPS - 1):
        earlier = tl.load(before_ptr + tap * CHANNELS, mask, 0.0)
        y += earlier.to(tl.float32) * tl.load(weight_ptr + channels * TAPS + tap, mask, 0.0).to(tl.float32)
        if tap > 0:
            tl.store(behind_ptr + (tap - 1) * CHANNELS, earlier, mask)
    y += own.to(tl.float32) * tl.load(weight_ptr + channels * TAPS + TAPS - 1, mask, 0.0).to(tl.float32)
    tl.store(behind_ptr + (TAPS - 2) * CHANNELS, own, mask)
    if bias_ptr is not None:
        y += tl.load(bias_ptr + channels, mask, 0.0).to(tl.float32)
    rounded = y.to(out_ptr.dtype.element_ty)
    if ACTIVATES:
        y = rounded.to(tl.float32)
        rounded = (y * tl.sigmoid(y)).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * CHANNELS + channels, rounded, mask)


@triton.jit
def state_place(row, head, keys, columns, HEADS: tl.constexpr, KEY_DIM: tl.constexpr, VALUE_DIM: tl.constexpr):
    """Where a block of a head's state lies in a row of the pool: (keys, columns), and what of it is there."""
    place = ((row * HEADS + head) * KEY_DIM + keys[:, None]) * VALUE_DIM + columns[None, :]
    return place, (keys < KEY_DIM)[:, None] & (columns < VALUE_DIM)[None, :]


@triton.jit
def unit_length(x):
    """x over its length."""
    return x * tl.rsqrt(tl.sum(x * x, 0) + 1e-6)


@kernel
def _delta_update(
    mixed_ptr,
    decay_ptr,
    beta_ptr,
    reads_ptr,
    writes_ptr,
    states_ptr,
    out_ptr,
    mixed_stride,
    scale,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    DECAYS: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    keys = tl.arange(0, BLOCK_KEYS)
    columns = tl.program_id(2) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    place, mask = state_place(tl.load(reads_ptr + row), head, keys, columns, HEADS, KEY_DIM, VALUE_DIM)
    state = tl.load(states_ptr + place, mask, 0.0)
    token_ptr = mixed_ptr + row * mixed_stride
    shared = head // (HEADS * KEY_DIM // KEYS) * KEY_DIM + keys
    query = unit_length(tl.load(token_ptr + shared, keys < KEY_DIM, 0.0).to(tl.float32)) * scale
    key = unit_length(tl.load(token_ptr + KEYS + shared, keys < KEY_DIM, 0.0).to(tl.float32))
    value = tl.load(token_ptr + 2 * KEYS + head * VALUE_DIM + columns, columns < VALUE_DIM, 0.0).to(tl.float32)
    own_decay_ptr = decay_ptr + (row * HEADS + head) * DECAYS
    if DECAYS == 1:
        state = state * tl.exp(tl.load(own_decay_ptr))
    else:
        state = state * tl.exp(tl.load(own_decay_ptr + keys, keys < KEY_DIM, 0.0))[:, None]
    change = (value - tl.sum(state * key[:, None], 0)) * tl.load(beta_ptr + row * HEADS + head)
    state = state + key[:, None] * change[None, :]
    place, mask = state_place(tl.load(writes_ptr + row), head, keys, columns, HEADS, KEY_DIM, VALUE_DIM)
    tl.store(states_ptr + place, state, mask)
    y = tl.sum(state * query[:, None], 0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + (row * HEADS + head) * VALUE_DIM + columns, y, columns < VALUE_DIM)


@kernel
def _space_update(
    mixed_ptr,
    decay_ptr,
    steps_ptr,
    skip_ptr,
    reads_ptr,
    writes_ptr,
    states_ptr,
    out_ptr,
    mixed_stride,
    HEADS: tl.constexpr,
    KEYS: tl.constexpr,
    KEY_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_KEYS: tl.constexpr,
    BLOCK_VALUES: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1)
    keys = tl.arange(0, BLOCK_KEYS)
    columns = tl.program_id(2) * BLOCK_VALUES + tl.arange(0, BLOCK_VALUES)
    place, mask = state_place(tl.load(reads_ptr + row), head, keys, columns, HEADS, KEY_DIM, VALUE_DIM)
    state = tl.load(states_ptr + place, mask, 0.0)
    token_ptr = mixed_ptr + row * mixed_stride
    shared = HEADS * VALUE_DIM + head // (HEADS * KEY_DIM // KEYS) * KEY_DIM + keys
    key = tl.load(token_ptr + shared, keys < KEY_DIM, 0.0).to(tl.float32)
    query = tl.load(token_ptr + KEYS + shared, keys < KEY_DIM, 0.0).to(tl.float32)
    value = tl.load(token_ptr + head * VALUE_DIM + columns, columns < VALUE_DIM, 0.0).to(tl.float32)
    taken = value * tl.load(steps_ptr + row * HEADS + head)
    state = state * tl.exp(tl.load(decay_ptr + row * HEADS + head)) + key[:, None] * taken[None, :]
    place, mask = state_place(tl.load(writes_ptr + row), head, keys, columns, HEADS, KEY_DIM, VALUE_DIM)
    tl.store(states_ptr + place, state, mask)
    y = tl.sum(state * query[:, None], 0) + value * tl.load(skip_ptr + head).to(tl.float32)
    tl.store(out_ptr + (row * HEADS + head) * VALUE_DIM + columns, y, columns < VALUE_DIM)
