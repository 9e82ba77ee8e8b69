"""Takes the tensors that gpt-oss keeps for all experts of a layer apart, so that each expert has its own.

Below `….experts.` such a checkpoint has, with rows of gate and up in turns:

    gate_up_proj_blocks, gate_up_proj_scales    MXFP4, see layouts.mxfp4: (experts, 2 * size, groups[, 16])
    gate_up_proj                                or plain: (experts, hidden, 2 * size), columns first
    gate_up_proj_bias                           (experts, 2 * size)
    down_proj…                                  the same with rows (hidden) that are not mixed

The model's tensors are `….experts.N.gate_proj.weight`, `up_proj` and `down_proj`, each with its `.bias`. They are read
in place, a few rows at a time.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointError,
    Part,
    Quantized,
    StoredTensor,
)
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.parts import Stored, misfit, part_of, scaled

PLACE = ".experts"  # in front of the names
MIXED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}  # stored tensor → those of the model
PARTS = (("blocks", 4), ("scales", 3))  # their ranks
BYTES = ("U8",)
MAX_EXPERTS = 1 << 12  # of a layer

Expand = Callable[[dict[str, torch.Tensor], int], torch.Tensor]


def with_experts(checkpoint: Checkpoint) -> Checkpoint:
    """The checkpoint with the experts' tensors found, if it has such. Raises CheckpointError for parts that misfit."""
    end = f"{PLACE}.gate_up_proj_bias"  # the plain form of other families has none
    prefixes = [name.removesuffix(".gate_up_proj_bias") for name in checkpoint.tensors if name.endswith(end)]
    found: dict[str, Quantized] = {}
    spent: set[str] = set()
    for prefix in prefixes:
        for own in MIXED:
            found |= matrices(prefix, own, checkpoint.tensors) | vectors(prefix, own, checkpoint.tensors)
            spent |= {f"{prefix}.{own}{part}" for part in ("", "_blocks", "_scales", "_bias")}
    return replace(
        checkpoint,
        quantized=checkpoint.quantized | found,
        spent=checkpoint.spent | (spent & checkpoint.tensors.keys()),
    )


def matrices(prefix: str, own: str, tensors: Stored) -> dict[str, Quantized]:
    """The weights of all experts that one stored tensor, or one pair, is made of. Raises CheckpointError."""
    if f"{prefix}.{own}" in tensors:
        return plain_matrices(prefix, own, part_of(tensors, prefix, own, DTYPES, 3))
    blocks, scales = (part_of(tensors, prefix, f"{own}_{kind}", BYTES, rank) for kind, rank in PARTS)
    experts, all_rows, groups, width = blocks.shape
    if width != layouts.MXFP4_BYTES:
        raise misfit(blocks, prefix, f"{own}_blocks", [experts, all_rows, groups, layouts.MXFP4_BYTES])
    if scales.shape != blocks.shape[:3]:
        raise misfit(scales, prefix, f"{own}_scales", list(blocks.shape[:3]))
    names = MIXED[own]
    check_sizes(blocks, prefix, all_rows, len(names))
    made = {}
    for expert in range(experts):
        pair = slice_of(blocks, expert), slice_of(scales, expert)
        for place, name in enumerate(names):
            parts = {
                kind: Part(part, 0, each=len(names), across=1, unit=(layouts.MXFP4_GROUP, 1))
                for (kind, _), part in zip(PARTS, pair, strict=True)
            }
            layout = partial(layouts.mxfp4, first=place, step=len(names))
            shape = all_rows // len(names), groups * layouts.MXFP4_GROUP
            whole = scaled(shape, parts, layout, 1, layouts.MXFP4, layouts.MXFP4_GROUP)
            made[f"{prefix}.{expert}.{name}.weight"] = whole
    return made


def plain_matrices(prefix: str, own: str, stored: StoredTensor) -> dict[str, Quantized]:
    """The same of (experts, columns, rows) in a float format."""
    experts, columns, all_rows = stored.shape
    names = MIXED[own]
    check_sizes(stored, prefix, all_rows, len(names))

    def expand(place: int) -> Expand:
        return lambda read, first: read[own][:, place :: len(names)].T

    return {
        f"{prefix}.{expert}.{name}.weight": Quantized(
            (all_rows // len(names), columns),
            {own: Part(slice_of(stored, expert), 1, each=len(names), across=0)},
            expand(place),
            unit_columns=1,
        )
        for expert in range(experts)
        for place, name in enumerate(names)
    }


def vectors(prefix: str, own: str, tensors: Stored) -> dict[str, Quantized]:
    """The biases of all experts. Raises CheckpointError."""
    stored = part_of(tensors, prefix, f"{own}_bias", DTYPES, 2)
    experts, all_rows = stored.shape
    names = MIXED[own]
    check_sizes(stored, prefix, all_rows, len(names))

    def expand(place: int) -> Expand:
        return lambda read, first: read["bias"][place :: len(names)]

    return {
        f"{prefix}.{expert}.{name}.bias": Quantized(
            (all_rows // len(names),), {"bias": Part(slice_of(stored, expert), 0, each=len(names))}, expand(place)
        )
        for expert in range(experts)
        for place, name in enumerate(names)
    }


def check_sizes(stored: StoredTensor, prefix: str, rows: int, names: int) -> None:
    """Raise CheckpointError for too many experts, or rows that cannot be divided among the tensors that share them."""
    if stored.shape[0] > MAX_EXPERTS:
        raise CheckpointError(f"{stored.shown}: {short(prefix)} has {stored.shape[0]} experts; {MAX_EXPERTS} are read")
    if rows % names:
        raise CheckpointError(f"{stored.shown}: {short(prefix)}: {rows} rows cannot be divided among {names} tensors")


def slice_of(stored: StoredTensor, expert: int) -> StoredTensor:
    """The part of a stored tensor that belongs to one expert."""
    nbytes = stored.nbytes // stored.shape[0]
    return replace(stored, shape=stored.shape[1:], offset=stored.offset + expert * nbytes, nbytes=nbytes)
