"""A checkpoint of which one rank reads its parts only: ranges of rows, or of columns, of the tensors that are cut.

A plain tensor's part is ranges of bytes, or a piece of every row. What is made of several stored tensors, or of blocks,
keeps its description, with the cut beside it: reading.py reads whole units around the part, and drops the rest.
"""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

import torch

from quartet.kernels.cpu.native.quantized import GROUP_SIZES, QuantizedRows, Scheme
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import (
    DTYPE_BYTES,
    Checkpoint,
    CheckpointError,
    Part,
    Quantized,
    StoredTensor,
)
from quartet.scheduler_service.weights.cuts import Cut
from quartet.scheduler_service.weights.storage import stored_scheme

SPLIT_ROWS = (
    "{}: --tp-size gives a rank {} rows of tensor {} from row {} on, and its rows are stored {} at a time; use another "
    "--tp-size"
)
BLOCKS = "blocks"


def own_parts(checkpoint: Checkpoint, cuts: dict[str, Cut]) -> Checkpoint:
    """The checkpoint as one rank reads it. Raises CheckpointError for tensors that cannot be cut."""
    if not cuts:
        return checkpoint
    tensors, made = dict(checkpoint.tensors), dict(checkpoint.quantized)
    for name, cut in cuts.items():
        if name in made:
            made[name] = part_of(name, made[name], cut)
        elif name in tensors and tensors[name].encoding is not None and cut.dimension:
            made[name] = part_of(name, rows_of_blocks(name, tensors[name]), cut)
        elif name in tensors:
            tensors[name] = stored_part(name, tensors[name], cut)
    return replace(checkpoint, tensors=tensors, quantized=made)


def stored_part(name: str, tensor: StoredTensor, cut: Cut) -> StoredTensor:
    """Where the bytes of a part are. Raises CheckpointError for rows that are stored together, and would be cut."""
    if tensor.shape != cut.whole or tensor.dtype not in DTYPE_BYTES:
        return tensor  # the check of the shapes says what is wrong
    shape = (*cut.whole[: cut.dimension], cut.length, *cut.whole[cut.dimension + 1 :])
    row_bytes = tensor.nbytes // cut.whole[0]
    if cut.dimension == 0:
        check_rows(name, tensor.shown, cut, max(1, tensor.unit[0] // row_bytes))
        pieces = tuple((tensor.offset + first * row_bytes, length * row_bytes) for first, length in cut.spans)
        several = pieces if len(pieces) > 1 else ()
        return replace(tensor, shape=shape, offset=pieces[0][0], nbytes=cut.length * row_bytes, pieces=several)
    assert prod(cut.whole[1:]) == cut.whole[cut.dimension], cut.whole  # a row has nothing else
    size = DTYPE_BYTES[tensor.dtype]
    ((start, _),) = cut.spans
    return replace(
        tensor,
        shape=shape,
        offset=tensor.offset + start * size,
        nbytes=cut.whole[0] * cut.length * size,
        pitch=row_bytes,
    )


def part_of(name: str, made: Quantized, cut: Cut) -> Quantized:
    """One rank's part of a tensor that is made of several. Raises CheckpointError likewise."""
    if made.shape != cut.whole:
        return made  # the check of the shapes says what is wrong
    if cut.dimension == 0:
        check_rows(name, made.shown, cut, made.unit_rows)
        return replace(made, shape=(cut.length, *made.shape[1:]), cut=cut)
    if made.divisible is not None:
        made = made.divisible() or made
    ((first, length),) = cut.spans
    scheme = scheme_of_part(made.scheme, first, length)
    return replace(made, shape=(made.shape[0], length), cut=cut, scheme=scheme)


def scheme_of_part(scheme: Scheme | None, first: int, length: int) -> Scheme | None:
    """The scheme that holds some columns of a matrix in a scheme; None where there is none."""
    if scheme is None:
        return None
    sizes = [size for size in GROUP_SIZES if size <= scheme.group_size and first % size == length % size == 0]
    return replace(scheme, group_size=max(sizes)) if sizes else None


def check_rows(name: str, file: object, cut: Cut, unit_rows: int) -> None:
    """Raise CheckpointError where a range of rows would begin or end within rows that are stored together."""
    for first, length in cut.spans:
        at_end = first + length == cut.whole[0]
        if first % unit_rows or (length % unit_rows and not at_end):
            raise CheckpointError(SPLIT_ROWS.format(file, length, short(name), first, unit_rows))


def rows_of_blocks(name: str, stored: StoredTensor) -> Quantized:
    """A matrix whose rows are blocks, as what is made of its bytes. Raises CheckpointError where rows are no blocks."""
    encoding = stored.encoding
    assert encoding is not None, stored
    if len(stored.shape) != 2 or stored.shape[1] % encoding.unit_values:
        raise CheckpointError(f"{stored.shown}: tensor {short(name)} ({encoding.name}): --tp-size cannot cut its rows")
    rows, columns = stored.shape
    lines = replace(stored, dtype="U8", shape=(rows, stored.nbytes // rows), encoding=None)
    unit = encoding.unit_values, encoding.unit_bytes

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        blocks = read[BLOCKS]
        return encoding.decode(blocks.flatten()).view(len(blocks), -1)

    def numbers(read: dict[str, torch.Tensor], first: int) -> QuantizedRows:
        assert encoding.numbers is not None
        blocks = read[BLOCKS]
        return encoding.numbers(blocks.flatten(), blocks.shape[1] // unit[1] * unit[0])

    return Quantized(
        (rows, columns),
        {BLOCKS: Part(lines, 0, across=1, unit=unit)},
        expand,
        scheme=encoding.scheme,
        numbers=None if encoding.scheme is None else numbers,
        unit_columns=unit[0],
    )


def cut_groups(whole: Checkpoint, own: Checkpoint) -> Iterator[str]:
    """The tensors whose stored numbers cannot be kept in a rank's part: a cut falls into a group with one scale."""
    for name, part in own.quantized.items():
        if part.cut is not None and part.scheme is None and stored_scheme(whole, name) is not None:
            yield name
