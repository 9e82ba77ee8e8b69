"""What the Triton kernels share: launching, activations, gated row products, and who comes last.

Everything inside a kernel is float32, whatever is stored. Kernels do not allocate, do not tune themselves and never
synchronise; a result depends on its own row alone. Shapes that stay for a model's lifetime are constexpr.
"""

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from quartet.kernels.triton.configs import Tile

NEGATIVE_INFINITY = tl.constexpr(float("-inf"))


def options(tile: Tile, dependent: bool = False) -> dict[str, object]:
    """A tile's launch options.

    A dependent launch (programmatic dependent launch) begins while the kernel before it still runs: it loads its first
    weights, then waits. The interpreter knows nothing of that, so the option is left out where it is off.
    """
    chosen: dict[str, object] = {"num_warps": tile.warps, "num_stages": tile.stages}
    return {**chosen, "launch_pdl": True} if dependent else chosen


def power_of_two(size: int) -> int:
    """Blocks have such sizes; what is beyond `size` is masked."""
    return triton.next_power_of_2(size)


def column_block(tile: Tile, columns: int, tokens: int) -> int:
    """Columns of a tile of `row_products`: each token has sums of its own in the registers."""
    return min(tile.columns, power_of_two(columns)) // power_of_two(tokens)


def blocks(size: int, block: int) -> int:
    return -(-size // block)


def head_stride(pool: torch.Tensor) -> int:
    """Elements from one head of a pool (kv_heads, tokens, dim) to the next; tokens lie side by side."""
    assert pool.stride(1) == pool.shape[2] and pool.stride(2) == 1, pool.stride()
    return pool.stride(0)


@triton.jit
def start_next_kernel(DEPENDENT: tl.constexpr):
    """Let the next kernel of the stream begin with what depends on nothing: loading its weights."""
    if DEPENDENT:
        gdc_launch_dependents()


@triton.jit
def wait_for_inputs(DEPENDENT: tl.constexpr):
    """Nothing that an earlier kernel writes may be read before this."""
    if DEPENDENT:
        gdc_wait()


@triton.jit
def tanh(x):
    """Saturates without overflow."""
    share = tl.exp(-2.0 * tl.abs(x))
    magnitude = (1.0 - share) / (1.0 + share)
    return tl.where(x < 0, -magnitude, magnitude)


@triton.jit
def activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        return x * tl.sigmoid(x)
    elif ACTIVATION == "gelu":  # noqa: RET505  (a compile-time chain: what follows a plain `if` is compiled too)
        return 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    else:
        tl.static_assert(ACTIVATION == "gelu_tanh")
        return 0.5 * x * (1.0 + tanh(0.7978845608028654 * (x + 0.044715 * x * x * x)))


@triton.jit
def scale_of_norm(norm_ptr, columns, mask, PLUS_ONE: tl.constexpr):
    """A norm's weights; Gemma stores their distance from one."""
    scale = tl.load(norm_ptr + columns, mask, 0.0).to(tl.float32)
    return scale + 1.0 if PLUS_ONE else scale


@triton.jit
def load_weights(weight_ptr, rows, row_mask, first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr):
    """A tile of a row-major matrix (rows, COLUMNS) as it is stored: (rows, BLOCK). Read once, so it need not stay."""
    columns = first + tl.arange(0, BLOCK)
    mask = row_mask[:, None] & (columns < COLUMNS)[None, :]
    place = rows.to(tl.int64)[:, None] * COLUMNS + columns[None, :]
    return tl.load(weight_ptr + place, mask, 0.0, eviction_policy="evict_first")


@triton.jit
def load_inputs(
    x_ptr, norm_ptr, tokens, token_mask, first, COLUMNS: tl.constexpr, BLOCK: tl.constexpr, PLUS_ONE: tl.constexpr
):
    """Inputs (tokens, BLOCK), scaled by the norm's weights if there are any, and their squares before that."""
    columns = first + tl.arange(0, BLOCK)
    within = columns < COLUMNS
    mask = token_mask[:, None] & within[None, :]
    x = tl.load(x_ptr + tokens.to(tl.int64)[:, None] * COLUMNS + columns[None, :], mask, 0.0).to(tl.float32)
    squares = x * x
    if norm_ptr is not None:
        x = x * scale_of_norm(norm_ptr, columns, within, PLUS_ONE)[None, :]
    return x, squares


@triton.jit
def row_products(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    rows,
    row_mask,
    tokens,
    token_mask,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """norm(x) @ weight[rows].T for a few tokens: (tokens, rows). The first weights are on their way before x is known.

    The norm's 1 / rms is one factor of a whole row, so it is applied at the end and x is read once. Threads keep sums
    of their own to the end, too: adding up across threads costs more than a tile's arithmetic.
    """
    TOKENS: tl.constexpr = tokens.shape[0]
    ROWS: tl.constexpr = rows.shape[0]
    weights = load_weights(weight_ptr, rows, row_mask, 0, COLUMNS, BLOCK)
    wait_for_inputs(DEPENDENT)
    sums = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        x, new_squares = load_inputs(x_ptr, norm_ptr, tokens, token_mask, first, COLUMNS, BLOCK, PLUS_ONE)
        sums += x[:, None, :] * weights.to(tl.float32)[None, :, :]
        squares += new_squares
        if COLUMNS > BLOCK:
            weights = load_weights(weight_ptr, rows, row_mask, first + BLOCK, COLUMNS, BLOCK)
    products = tl.sum(sums, 2)
    if norm_ptr is not None:
        products = products * tl.rsqrt(tl.sum(squares, 1) / COLUMNS + epsilon)[:, None]
    return products


@triton.jit
def row_product_pairs(
    x_ptr,
    norm_ptr,
    epsilon,
    weight_ptr,
    rows,
    distance,
    row_mask,
    tokens,
    token_mask,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    PLUS_ONE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """`row_products` for rows and for those `distance` further down, which belong together: two (tokens, rows)."""
    TOKENS: tl.constexpr = tokens.shape[0]
    ROWS: tl.constexpr = rows.shape[0]
    weights = load_weights(weight_ptr, rows, row_mask, 0, COLUMNS, BLOCK)
    partners = load_weights(weight_ptr, rows + distance, row_mask, 0, COLUMNS, BLOCK)
    wait_for_inputs(DEPENDENT)
    sums = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    partner_sums = tl.zeros((TOKENS, ROWS, BLOCK), tl.float32)
    squares = tl.zeros((TOKENS, BLOCK), tl.float32)
    for first in range(0, COLUMNS, BLOCK):
        x, new_squares = load_inputs(x_ptr, norm_ptr, tokens, token_mask, first, COLUMNS, BLOCK, PLUS_ONE)
        sums += x[:, None, :] * weights.to(tl.float32)[None, :, :]
        partner_sums += x[:, None, :] * partners.to(tl.float32)[None, :, :]
        squares += new_squares
        if COLUMNS > BLOCK:
            weights = load_weights(weight_ptr, rows, row_mask, first + BLOCK, COLUMNS, BLOCK)
            partners = load_weights(weight_ptr, rows + distance, row_mask, first + BLOCK, COLUMNS, BLOCK)
    products = tl.sum(sums, 2)
    partner_products = tl.sum(partner_sums, 2)
    if norm_ptr is not None:
        inverse = tl.rsqrt(tl.sum(squares, 1) / COLUMNS + epsilon)[:, None]
        products, partner_products = products * inverse, partner_products * inverse
    return products, partner_products


@triton.jit
def comes_last(counter_ptr, programs):
    """Whether all `programs` that share a counter have stored their parts; the last one resets it for the next launch.

    Its loads must bypass the first-level cache (cache_modifier=".cg").
    """
    tl.debug_barrier()  # every thread's stores come before the one thread's release
    arrived = tl.atomic_add(counter_ptr, 1, sem="acq_rel", scope="gpu")
    last = arrived == programs - 1
    if last:
        tl.store(counter_ptr, 0)
    tl.debug_barrier()
    return last
