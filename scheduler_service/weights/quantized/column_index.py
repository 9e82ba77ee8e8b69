"""Matrices with an index that says which group each of their columns belongs to, as GPTQ writes it.

Mostly it says what is so without it: groups are columns side by side. Where they are not (act-order), the scales of
some columns may be those of any group.
"""

from dataclasses import replace

import torch

from quartet.scheduler_service.weights.checkpoint import Part, Quantized
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.parts import WORDS, Stored, misfit, part_of
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_exactly


def with_index(made: Quantized, prefix: str, own: str, tensors: Stored, groups: int) -> Quantized:
    """A matrix with its index, if there is one. Raises CheckpointError for one that misfits.

    Its rows are read whole then; whoever wants some of its columns learns from the index whether they lie side by side.
    """
    if f"{prefix}.{own}" not in tensors:
        return made
    columns = made.shape[1]
    index = part_of(tensors, prefix, own, WORDS, 1)
    if index.shape != (columns,):
        raise misfit(index, prefix, own, [columns])

    def divisible() -> Quantized | None:
        group_of = torch.empty(columns, dtype=torch.int32)
        with open_file(index.file) as descriptor:
            read_exactly(descriptor, bytes_of(group_of), index.offset, index.file)
        try:
            in_order = layouts.column_order(group_of, groups, columns // groups) is None
        except ValueError:
            return None  # who reads the values says what is wrong
        return made if in_order else None

    return replace(made, parts={**made.parts, own: Part(index, None)}, unit_columns=0, divisible=divisible)
