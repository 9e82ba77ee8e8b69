"""What an update in several requests has collected."""

from dataclasses import dataclass, field

import torch


@dataclass(slots=True)
class Session:
    """The tensors collected so far; where only a part of a buffer is new, the rest was copied from what serves."""

    names: set[str] = field(default_factory=set)
    aliases: dict[str, torch.Tensor] = field(default_factory=dict)  # what must equal the tensors they are tied to
    version: str | None = None  # the weight version that its last bucket asked for
    broken: str = ""  # why it cannot be finished
    implicit: bool = False  # of a single command, which swaps at once
