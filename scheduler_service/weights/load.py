"""Fills a model's weights from its directory.

`check_tensors` compares names, shapes and dtypes before a byte is copied; `read_weights` copies.
"""

import logging
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from math import prod
from pathlib import Path

import torch

from quartet.kernels.cpu.linear import no_pause
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process.memory import give_back
from quartet.runtime.shorten import short
from quartet.scheduler_service.host.device import shortage
from quartet.scheduler_service.weights import device_staging, gguf, pickled, storage, ties
from quartet.scheduler_service.weights.checkpoint import (
    DTYPE_BYTES,
    DTYPES,
    INDEX_NAME,
    Checkpoint,
    CheckpointError,
    StoredTensor,
)
from quartet.scheduler_service.weights.formats import checkpoint_of, format_of
from quartet.scheduler_service.weights.own_parts import own_parts
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.progress import with_progress
from quartet.scheduler_service.weights.quantized import reading
from quartet.scheduler_service.weights.tensor_io import open_file, read_chunks

log = logging.getLogger(__name__)

MAX_NAMES = 8  # of a long list of tensors that are shown
LOAD_FORMATS = ("auto", "safetensors", "gguf", "dummy")
PIECE_BYTES = 4 << 20  # of encoded tensors, for one thread


def load_weights(weights: Weights, config: ResolvedConfig, info: ModelInfo) -> None:
    """Fill `weights` by --load-format, and have the layers use them. Raises StartupError."""
    if weights.device.type == "cpu":  # a GPU has said so already
        check_room(weights.served_bytes(), weights.device)
    if is_dummy(config):
        weights.fill_random(config.dummy_seed)
    else:
        checkpoint = ties.with_tied_tensors(open_checkpoint(Path(info.path)), weights.layout)
        checkpoint = own_parts(checkpoint, weights.layout.cuts)
        check_tensors(checkpoint, weights)
        gguf.log_expansion(checkpoint, weights)
        log_quantized(checkpoint, weights)
        read_weights(checkpoint, weights, with_progress(checkpoint.files))
        storage.log_storage(weights, config.quantization)
        pickled.forget_converted()
    weights.after_update()
    if weights.schemes:  # what they were made from was large
        give_back()


def check_room(needed: int, device: torch.device) -> None:
    """Raise StartupError where there is no room for so many bytes: the kernel would kill the process later."""
    if reason := shortage(needed, device):
        raise StartupError(
            f"no room for the model's weights and the copies that are computed with: {reason}; "
            "allow the server more memory, or serve a smaller model"
        )


def is_dummy(config: ResolvedConfig) -> bool:
    """Whether --load-format asks for random weights; raises StartupError for one that does not exist."""
    if config.load_format not in LOAD_FORMATS:
        raise StartupError(f"--load-format {config.load_format} is unknown; choose one of {', '.join(LOAD_FORMATS)}")
    return config.load_format == "dummy"


def check_format(load_format: str, directory: Path) -> None:
    """Raise CheckpointError where only files of one format are wanted and there are others."""
    found = format_of(directory)
    if load_format == "safetensors" and found == "bin":
        raise CheckpointError(
            f"{directory} has pickled *.bin files only, and the load format is safetensors; choose auto"
        )
    if load_format in ("safetensors", "gguf") and found not in (load_format, "none"):
        raise CheckpointError(f"{directory} holds weights in the format {found}, not {load_format}; choose auto")


def open_checkpoint(directory: Path) -> Checkpoint:
    """The directory's checkpoint; logs what was found."""
    checkpoint = checkpoint_of(directory)
    found = format_of(directory)
    log.info("Using model weights format ['*.%s']", found)
    if not checkpoint.indexed and found == "safetensors":
        log.info("No %s found in %s.", INDEX_NAME, directory)
    return checkpoint


def check_tensors(checkpoint: Checkpoint, weights: Weights) -> None:
    """Raise CheckpointError unless every tensor of the model is there, in its shape and a float dtype."""
    names = weights.names()
    known = checkpoint.tensors.keys() | checkpoint.quantized.keys()
    if missing := [name for name in names if name not in known]:
        raise CheckpointError(f"the checkpoint lacks {tensor_list(missing)}")
    for name, (shape, _) in names.items():
        stored = checkpoint.quantized.get(name) or checkpoint.tensors[name]
        if stored.shape != shape:
            raise CheckpointError(
                f"{stored.shown}: tensor {name} has shape {list(stored.shape)}, the model needs {list(shape)}"
            )
        if isinstance(stored, StoredTensor) and stored.dtype not in DTYPES:
            raise CheckpointError(f"{stored.shown}: tensor {name} is {stored.dtype}, which is not supported")
    if unexpected := sorted(checkpoint.tensors.keys() - checkpoint.spent - names.keys() - weights.layout.ignored):
        if checkpoint.strict:
            raise CheckpointError(f"the model has no use for {tensor_list(unexpected)} of {checkpoint.files[0]}")
        log.warning("The model has no use for %s of the checkpoint.", tensor_list(unexpected))


def read_weights(checkpoint: Checkpoint, weights: Weights, files: Iterable[Path]) -> None:
    """Copy every tensor to its place, file by file, in the order of the bytes on disk; quantized ones at the end."""
    quantized = weights.names().keys() & checkpoint.quantized.keys()
    names = sorted(weights.names().keys() - quantized, key=lambda name: checkpoint.tensors[name].offset)
    for file in files:
        own = [name for name in names if checkpoint.tensors[name].file == file]
        if weights.device.type == "cuda" and not weights.layout.cuts:
            device_staging.read_to_device(checkpoint, own, weights)
            continue
        plain = {name: weights.view(name) for name in own if weights.quantized_of(name) is None}
        read_tensors(checkpoint, plain, [file])
        with open_file(file) as descriptor:
            for name in own:
                if name not in plain:
                    storage.read_numbers(name, checkpoint.tensors[name], weights, descriptor, no_pause)
    for name in sorted(quantized):
        reading.read_quantized(name, checkpoint.quantized[name], weights)


def log_quantized(checkpoint: Checkpoint, weights: Weights) -> None:
    """Log what it takes that quantized weights are expanded; nothing where there are none."""
    expanded = [
        made
        for name, made in checkpoint.quantized.items()
        if not reading.stays(name, made, weights)
        and any(part.stored.dtype not in DTYPES for part in made.parts.values())
    ]
    if expanded:
        log.info(
            "%d quantized tensors are expanded to %s: %.2f GB in the files; all weights take %.2f GB of memory.",
            len(expanded),
            str(weights.dtype).removeprefix("torch."),
            sum(tensor.nbytes for tensor in expanded) / 1e9,
            weights.nbytes() / 1e9,
        )


def read_state(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    """All floating tensors of a checkpoint under its own names and dtypes, with a progress bar."""
    parts = (part for made in checkpoint.quantized.values() for part in made.parts.values())
    if any(part.stored.dtype not in DTYPES for part in parts):
        raise CheckpointError("quantized weights are read for native families only; serve an unquantized checkpoint")
    stored = checkpoint.tensors.items()
    check_room(sum(prod(t.shape) * DTYPE_BYTES[t.dtype] for _, t in stored), torch.device("cpu"))
    state = {name: torch.empty(t.shape, dtype=DTYPES[t.dtype]) for name, t in stored if t.dtype in DTYPES}
    read_tensors(checkpoint, state, with_progress(checkpoint.files))
    return state


def read_tensors(checkpoint: Checkpoint, targets: dict[str, torch.Tensor], files: Iterable[Path]) -> None:
    """Copy tensors to the targets of the same names."""
    names = sorted(targets, key=lambda name: checkpoint.tensors[name].offset)
    for file in files:
        own = [(checkpoint.tensors[name], targets[name]) for name in names if checkpoint.tensors[name].file == file]
        with open_file(file) as descriptor:
            for stored, target in own:
                if stored.encoding is None:
                    read_part(stored, target, descriptor)
            read_encoded([(stored, target) for stored, target in own if stored.encoding is not None], descriptor)


def read_part(
    stored: StoredTensor, target: torch.Tensor, descriptor: int, begin: int = 0, end: int | None = None
) -> None:
    """Copy a tensor, or the values of some of its bytes, to their place in the target."""
    for _ in read_chunks(stored, target, descriptor, begin=begin, end=end):
        pass


def read_encoded(tensors: list[tuple[StoredTensor, torch.Tensor]], descriptor: int) -> None:
    """Read and decode tensors in as many threads as torch has: its own would wait for each other at every operation."""
    if not tensors:
        return
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(threads, "decode", initializer=torch.set_num_threads, initargs=(1,)) as pool:
        try:
            for done in [pool.submit(read_part, *part) for part in parts_of(tensors, descriptor)]:
                done.result()
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(threads)  # threads that are started later begin with the number set last


def parts_of(
    tensors: list[tuple[StoredTensor, torch.Tensor]], descriptor: int
) -> Iterator[tuple[StoredTensor, torch.Tensor, int, int, int]]:
    """The arguments of `read_part` for parts of tensors that take a moment each."""
    for stored, target in tensors:
        step = stored.chunk_bytes(PIECE_BYTES)
        for begin in range(0, stored.nbytes, step):
            yield stored, target, descriptor, begin, min(begin + step, stored.nbytes)


def tensor_list(names: list[str]) -> str:
    """For example `2 tensors: a, b`."""
    rest = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
    return f"{len(names)} tensor{'s'[: len(names) != 1]}: {', '.join(map(short, names[:MAX_NAMES]))}{rest}"
