"""Which format the weights of a directory have: safetensors where there are any, else *.bin, else GGUF."""

from dataclasses import replace
from pathlib import Path
from typing import Literal

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info, task_adapters
from quartet.scheduler_service.weights import gguf, pickled
from quartet.scheduler_service.weights.checkpoint import SINGLE_NAME, Checkpoint, CheckpointError, read_header
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
    return found + dense_files(directory) + task_files(directory) if found else gguf.files_of(directory)


def checkpoint_of(directory: Path) -> Checkpoint:
    """The checkpoint of a directory, of whichever format. Raises CheckpointError."""
    match format_of(directory):
        case "gguf":
            return gguf.checkpoint_of(directory)
        case "bin":
            return with_quantized(pickled.checkpoint_of(directory), directory)
        case _:
            found = with_dense_layers(with_quantized(Checkpoint.open(directory), directory), directory)
            return with_task_adapters(found, directory)


def with_dense_layers(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The same with the layers that sentence-transformers keeps in folders. Raises CheckpointError.

    Tensor `x` of folder N_Dense is called N_Dense.x.
    """
    return with_folders(checkpoint, dense_files(directory))


def with_task_adapters(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The same with the adapters that a model has in folders, one for each task. Raises CheckpointError.

    Tensor `x` of folder F is called F.x.
    """
    return with_folders(checkpoint, task_files(directory))


def with_folders(checkpoint: Checkpoint, files: list[Path]) -> Checkpoint:
    """The same with the tensors of files in folders, each behind the name of its folder."""
    found = {f"{file.parent.name}.{name}": tensor for file in files for name, tensor in read_header(file).items()}
    return replace(checkpoint, files=checkpoint.files + files, tensors={**checkpoint.tensors, **found})


def dense_files(directory: Path) -> list[Path]:
    """Those of the layers that sentence-transformers keeps in folders."""
    return sorted(directory.glob(f"*_Dense/{SINGLE_NAME}"))


def task_files(directory: Path) -> list[Path]:
    """Those of the adapters that a model has for tasks. Raises CheckpointError."""
    if not any(directory.glob(f"*/{task_adapters.WEIGHTS}")):
        return []
    try:
        architecture, config = model_info.read_config(directory)
        tasks = task_adapters.tasks_of(directory, architecture, config)
    except StartupError as error:
        raise CheckpointError(str(error)) from error
    return sorted(directory / folder / task_adapters.WEIGHTS for folder in tasks.values() if folder)
