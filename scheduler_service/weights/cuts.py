"""Which part of a tensor belongs to one rank."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Cut:
    """Ranges along one dimension of a tensor, which the part has one behind the other."""

    whole: tuple[int, ...]  # the shape of the tensor
    dimension: int
    spans: tuple[tuple[int, int], ...]  # first place and length of each; along columns there is one

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
