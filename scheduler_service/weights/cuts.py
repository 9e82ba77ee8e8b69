"""Which part of a checkpoint's tensor belongs to one rank, and a checkpoint of which only those parts are read."""

from dataclasses import dataclass, replace

import torch

from quartet.scheduler_service.weights.checkpoint import DTYPE_BYTES, Checkpoint, CheckpointError, StoredTensor


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
    if checkpoint.quantized:
        raise CheckpointError(
            "the checkpoint is quantized, or has all experts of a layer in one tensor: --tp-size cannot cut it; serve "
            "an unquantized one with a tensor for each expert, or leave --tp-size out"
        )
    tensors = {name: cuts[name].stored(name, t) if name in cuts else t for name, t in checkpoint.tensors.items()}
    return replace(checkpoint, tensors=tensors)
