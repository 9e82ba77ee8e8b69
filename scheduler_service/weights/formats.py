"""Which format the weights of a directory have: safetensors where there are any, else *.bin, else GGUF."""

from pathlib import Path
from typing import Literal

from quartet.scheduler_service.weights import gguf, pickled
from quartet.scheduler_service.weights.checkpoint import Checkpoint
from quartet.scheduler_service.weights.quantized.methods import with_quantized

Format = Literal["safetensors", "bin", "gguf", "none"]


def format_of(directory: Path) -> Format:
    """The format that is read. Raises CheckpointError for an index that cannot be read."""
    if pickled.pickled_files(directory):
        return "bin"
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json")):
        return "safetensors"
    return "gguf" if gguf.files_of(directory) else "none"


def weight_files(directory: Path) -> list[Path]:
    """The files that hold the weights."""
    found = pickled.pickled_files(directory) or sorted(directory.glob("*.safetensors"))
    return found or gguf.files_of(directory)


def checkpoint_of(directory: Path) -> Checkpoint:
    """The checkpoint of a directory, of whichever format. Raises CheckpointError."""
    match format_of(directory):
        case "gguf":
            return gguf.checkpoint_of(directory)
        case "bin":
            return with_quantized(pickled.checkpoint_of(directory), directory)
        case _:
            return with_quantized(Checkpoint.open(directory), directory)
