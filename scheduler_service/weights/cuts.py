"""Which part of a checkpoint's tensor belongs to one rank, and a checkpoint of which only those parts are read."""

from dataclasses import dataclass, replace
from math import prod

import torch

from quartet.scheduler_service.weights.checkpoint import (
    DTYPE_BYTES,
    DTYPES,
    Checkpoint,
    CheckpointError,
    Quantized,
    StoredTensor,
)


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges along one dimension of a tensor, which the part has one behind the other."""

    whole: tuple[int, ...]  # the shape of the tensor
    dimension: int
    spans: tuple[tuple[int, int], ...]  # first place and length of each

    @property
    def length(self) -> int:
        """Of the part, along the dimension."""
        return sum(length for _, length in self.spans)

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole tensor; a view where it is one range."""
        parts = [tensor.narrow(self.dimension, *span) for span in self.spans]
        return parts[0] if len(parts) == 1 else torch.cat(parts, self.dimension)

    def put(self, part: torch.Tensor, whole: torch.Tensor) -> None:
        """The reverse of `of`: write this rank's part to its places in the whole tensor."""
        lengths = [length for _, length in self.spans]
        for span, piece in zip(self.spans, part.split(lengths, self.dimension), strict=True):
            whole.narrow(self.dimension, *span).copy_(piece)

    def stored(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """Where the bytes of this part are. Raises CheckpointError where they cannot be told apart."""
        if tensor.encoding is not None:
            raise CheckpointError(f"{tensor.shown}: tensor {name} is quantized, which --tp-size cannot cut")
        if tensor.shape != self.whole or tensor.dtype not in DTYPE_BYTES:
            return tensor  # the check of the shapes says what is wrong
        shape = (*self.whole[: self.dimension], self.length, *self.whole[self.dimension + 1 :])
        row_bytes = tensor.nbytes // self.whole[0]
        if self.dimension == 0:
            pieces = tuple((tensor.offset + first * row_bytes, length * row_bytes) for first, length in self.spans)
            several = pieces if len(pieces) > 1 else ()
            return replace(tensor, shape=shape, offset=pieces[0][0], nbytes=self.length * row_bytes, pieces=several)
        assert prod(self.whole[1:]) == self.whole[self.dimension], self.whole  # a row has nothing else
        size = DTYPE_BYTES[tensor.dtype]
        ((start, _),) = self.spans
        return replace(
            tensor,
            shape=shape,
            offset=tensor.offset + start * size,
            nbytes=self.whole[0] * self.length * size,
            pitch=row_bytes,
        )


def own_parts(checkpoint: Checkpoint, cuts: dict[str, Cut]) -> Checkpoint:
    """The checkpoint as one rank reads it. Raises CheckpointError for tensors that cannot be cut."""
    if not cuts:
        return checkpoint
    tensors = {name: cuts[name].stored(name, t) if name in cuts else t for name, t in checkpoint.tensors.items()}
    made = {name: part_of_rows(t, cuts[name]) if name in cuts else t for name, t in checkpoint.quantized.items()}
    return replace(checkpoint, tensors=tensors, quantized=made)


def part_of_rows(made: Quantized, cut: Cut) -> Quantized:
    """One rank's part of a matrix that is rows of a larger tensor. Raises CheckpointError for what is anything else."""
    part = made.parts.get("rows")
    if len(made.parts) > 1 or part is None or part.axis != 0 or part.stored.dtype not in DTYPES:
        raise CheckpointError(
            "the checkpoint is quantized, or has all experts of a layer in one tensor, columns first: --tp-size cannot "
            "cut it; serve an unquantized one with a tensor for each expert, or leave --tp-size out"
        )
    if made.shape != cut.whole:
        return made  # the check of the shapes says what is wrong
    if cut.dimension == 0 and len(cut.spans) == 1:
        own = replace(part, stored=cut.stored("", part.stored))
        return replace(made, shape=own.stored.shape, parts={"rows": own})

    if cut.dimension == 0:
        raise CheckpointError("the checkpoint has several matrices of an expert in one: --tp-size cannot cut it")

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return cut.of(made.expand(read, first))

    return replace(made, shape=(made.shape[0], cut.length), expand=expand)
