"""Takes the tensors that hold all experts of a layer apart, so that each expert has its own.

    gate and up    (experts, 2 * size, hidden), or columns first: (experts, hidden, 2 * size); gate stands in front
    down           (experts, hidden, size), or columns first: (experts, size, hidden)

nomic's experts lie one below the other, without a gate, and the router tells how many they are:

    w1    (experts * size, hidden)
    w2    (experts * size, hidden), columns first

The model's tensors are `….experts.N.gate_proj.weight`, `up_proj` and `down_proj`. They are read in place. gpt-oss,
whose gate and up alternate, is read by mxfp4.py.
"""

from dataclasses import replace

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    DTYPE_BYTES,
    DTYPES,
    Checkpoint,
    CheckpointError,
    Part,
    Quantized,
    StoredTensor,
)
from quartet.scheduler_service.weights.quantized.mxfp4 import check_sizes, slice_of
from quartet.scheduler_service.weights.quantized.parts import part_of

# names of the two tensors, below the block whose experts they are
STACKS = (("experts.gate_up_proj", "experts.down_proj"), ("input_linear.weight", "output_linear.weight"))
BELOW = ("experts.mlp.w1", "experts.mlp.w2", "router.layer.weight")  # nomic's names, likewise
MISFIT = "{}: the experts of {} have shapes {} and {}, which do not belong together"


def with_stacks(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the experts' tensors found, if it has such. Raises CheckpointError for parts that misfit."""
    found: dict[str, Quantized] = {}
    spent: set[str] = set()
    for name, stored in checkpoint.tensors.items():
        for ends in STACKS:
            if name.endswith(f".{ends[0]}") and len(stored.shape) == 3 and name not in checkpoint.spent:
                block = name.removesuffix(f".{ends[0]}")
                if stored.dtype in DTYPES:
                    found |= experts_of(checkpoint, block, *ends)
                    spent |= {f"{block}.{end}" for end in ends}
        if name.endswith(f".{BELOW[0]}"):
            block = name.removesuffix(f".{BELOW[0]}")
            found |= experts_below(checkpoint, block)
            spent |= {f"{block}.{end}" for end in BELOW[:2]}
    return replace(checkpoint, quantized=checkpoint.quantized | found, spent=checkpoint.spent | spent)


def experts_of(checkpoint: Checkpoint, block: str, gate_up_name: str, down_name: str) -> dict[str, Quantized]:
    """The matrices of all experts of one layer. Raises CheckpointError for shapes that do not belong together."""
    gate_up = part_of(checkpoint.tensors, block, gate_up_name, DTYPES, 3)
    down = part_of(checkpoint.tensors, block, down_name, DTYPES, 3)
    experts, rows, columns = gate_up.shape
    columns_first = columns == 2 * down.shape[1]  # where rows come first, `columns` is the same as down.shape[1]
    if columns_first:
        rows, columns = columns, rows
    size = rows // 2
    check_sizes(gate_up, f"{block}.{gate_up_name}", rows, 2)
    if down.shape != ((experts, size, columns) if columns_first else (experts, columns, size)):
        raise CheckpointError(MISFIT.format(down.shown, short(block), list(gate_up.shape), list(down.shape)))
    matrix = columns_first_matrix if columns_first else rows_first_matrix
    made = {}
    for expert in range(experts):
        inside = f"{block}.experts.{expert}"
        both, last = slice_of(gate_up, expert), slice_of(down, expert)
        made[f"{inside}.gate_proj.weight"] = matrix(both, 0, size)
        made[f"{inside}.up_proj.weight"] = matrix(both, size, size)
        made[f"{inside}.down_proj.weight"] = matrix(last, 0, columns)
    return made


def experts_below(checkpoint: Checkpoint, block: str) -> dict[str, Quantized]:
    """The same of experts that lie one below the other. Raises CheckpointError likewise."""
    up, down, router = (part_of(checkpoint.tensors, block, end, DTYPES, 2) for end in BELOW)
    experts, (rows, hidden) = router.shape[0], up.shape
    check_sizes(replace(up, shape=(experts, rows, hidden)), f"{block}.{BELOW[0]}", rows, experts)
    if down.shape != up.shape or hidden != router.shape[1]:
        raise CheckpointError(MISFIT.format(up.shown, short(block), list(up.shape), list(down.shape)))
    size, made = rows // experts, {}
    for expert in range(experts):
        inside, first = f"{block}.experts.{expert}", expert * size
        made[f"{inside}.up_proj.weight"] = rows_first_matrix(up, first, size)
        made[f"{inside}.down_proj.weight"] = columns_first_matrix(rows_of(down, first, size), 0, hidden)
    return made


def rows_of(stored: StoredTensor, first: int, rows: int) -> StoredTensor:
    """Some rows of a stored matrix."""
    row_bytes = stored.nbytes // stored.shape[0]
    offset = stored.offset + first * row_bytes
    return replace(stored, shape=(rows, stored.shape[1]), offset=offset, nbytes=rows * row_bytes)


def rows_first_matrix(stored: StoredTensor, first: int, rows: int) -> Quantized:
    """Some rows of a stored matrix."""
    part = rows_of(stored, first, rows)
    return Quantized(part.shape, {"rows": Part(part, 0, across=1)}, lambda read, _: read["rows"], unit_columns=1)


def columns_first_matrix(stored: StoredTensor, first: int, rows: int) -> Quantized:
    """Some columns of a stored matrix as rows. They are read all at once: pieces of all its lines would be many."""
    columns, line_bytes = stored.shape[0], stored.nbytes // stored.shape[0]
    size = DTYPE_BYTES[stored.dtype]
    part = replace(
        stored,
        shape=(columns, rows),
        offset=stored.offset + first * size,
        nbytes=columns * rows * size,
        pitch=line_bytes if rows < stored.shape[1] else 0,
    )
    return Quantized(
        (rows, columns),
        {"lines": Part(part, 1, across=0)},
        lambda read, _: read["lines"].T,
        unit_columns=1,
        at_once=True,
    )
