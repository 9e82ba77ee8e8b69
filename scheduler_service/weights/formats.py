"""Which format the weights of a directory have: safetensors where there are any, else *.bin, else GGUF."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from quartet.scheduler_service.weights import gguf, pickled
from quartet.scheduler_service.weights.checkpoint import SINGLE_NAME, Checkpoint, read_header
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
    return found + dense_files(directory) if found else gguf.files_of(directory)


def checkpoint_of(directory: Path) -> Checkpoint:
    """The checkpoint of a directory, of whichever format. Raises CheckpointError."""
    match format_of(directory):
        case "gguf":
            return gguf.checkpoint_of(directory)
        case "bin":
            return with_quantized(pickled.checkpoint_of(directory), directory)
        case _:
            return with_dense_layers(with_quantized(Checkpoint.open(directory), directory), directory)


def with_dense_layers(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The same with the layers that sentence-transformers keeps in folders. Raises CheckpointError.

    Tensor `x` of folder N_Dense is called N_Dense.x.
    """
    files = dense_files(directory)
    found = {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in read_header(file).items()}
    return replace(checkpoint, files=checkpoint.files + files, tensors={**checkpoint.tensors, **found})


def dense_files(directory: Path) -> list[Path]:
    """Those of the layers that sentence-transformers keeps in folders."""
    return sorted(directory.glob(f"*_Dense/{SINGLE_NAME}"))
