"""Which part of a checkpoint's tensor belongs to one rank, and a checkpoint of which only those parts are read."""

from dataclasses import dataclass, replace

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
    """A range along one dimension of a tensor."""

    whole: tuple[int, ...]  # the shape of the tensor
    dimension: int
    start: int
    length: int

    def of(self, tensor: torch.Tensor) -> torch.Tensor:
        """This rank's part of the whole tensor."""
        return tensor.narrow(self.dimension, self.start, self.length)

    def stored(self, name: str, tensor: StoredTensor) -> StoredTensor:
        """Where the bytes of this part are. Raises CheckpointError where they cannot be told apart."""
        if tensor.encoding is not None:
            raise CheckpointError(f"{tensor.shown}: tensor {name} is quantized, which --tp-size cannot cut")
        if tensor.shape != self.whole or tensor.dtype not in DTYPE_BYTES:
            return tensor  # the check of the shapes says what is wrong
        shape = (*self.whole[: self.dimension], self.length, *self.whole[self.dimension + 1 :])
        row_bytes = tensor.nbytes // self.whole[0]
        if self.dimension == 0:
            return replace(
                tensor, shape=shape, offset=tensor.offset + self.start * row_bytes, nbytes=self.length * row_bytes
            )
        size = DTYPE_BYTES[tensor.dtype]
        return replace(
            tensor,
            shape=shape,
            offset=tensor.offset + self.start * size,
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
    if cut.dimension == 0:
        own = replace(part, stored=cut.stored("", part.stored))
        return replace(made, shape=own.stored.shape, parts={"rows": own})

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return cut.of(made.expand(read, first))

    return replace(made, shape=(made.shape[0], cut.length), expand=expand)
