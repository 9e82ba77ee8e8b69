"""Stages new values into a second set of buffers, and finds everything that is wrong with them on the way.

Nothing here touches what is served. Files are read in chunks; while a chunk is in the CPU's cache it is hashed for the
manifest and its values are checked to be finite. A file must be the same, by identity, size and times, from before its
header is parsed until after its last byte is read.
"""

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ParamSpec, TypeVar

import torch
import xxhash

from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights import device_staging, load, manifest, storage, ties
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from quartet.scheduler_service.weights.file_identity import FileIdentity, identity_of, stat_file
from quartet.scheduler_service.weights.formats import weight_files
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.own_parts import own_parts
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.progress import with_progress
from quartet.scheduler_service.weights.quantized import reading
from quartet.scheduler_service.weights.tensor_io import bytes_of, open_file, read_chunks

CHUNK_BYTES = 1 << 20  # read between two yield points
STAGED_VALUES = 1 << 18  # of a quantized tensor, expanded between two yield points
QUIET_S = 0.05  # files must not have been written to for so long
TABLES = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # not weights: ignored

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

Identities = dict[Path, FileIdentity]


def on_one_thread(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Have torch compute on one thread in `work`: the steps need the other cores."""

    @functools.wraps(work)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        torch.set_num_threads(1)  # of this thread only
        with torch.no_grad():
            return work(*arguments, **named)

    return run


def stable_identities(directory: Path) -> Identities:
    """The identities of a directory's weight files, once these have not been written to for a moment.

    Times on disk advance in steps: a file written to within the same step as now could be written to again unnoticed.
    Raises CheckpointError for a file that is being written to, or is not a regular one.
    """
    found = stat_files(directory)
    newest_s = max((status.st_mtime for status in found.values()), default=0.0)
    if 0 <= (age_s := time.time() - newest_s) < QUIET_S:
        time.sleep(QUIET_S - age_s)
    again = {path: FileIdentity.of(status) for path, status in stat_files(directory).items()}
    for path, status in found.items():
        if again.get(path) != FileIdentity.of(status):
            raise CheckpointError(f"{path} is being written")
    return again


def stat_files(directory: Path) -> dict[Path, os.stat_result]:
    """The status of a directory's weight files. Raises CheckpointError for one that is not a regular file."""
    found = {path: stat_file(path) for path in weight_files(directory)}
    for path, status in found.items():
        if not stat.S_ISREG(status.st_mode):
            raise CheckpointError(f"{path} is no regular file")
    return found


def open_checkpoint(directory: Path, load_format: str) -> tuple[Identities, Checkpoint | None]:
    """The checkpoint of a directory (None: dummy weights), and the identities that its files had before.

    Raises CheckpointError.
    """
    if load_format == "dummy":
        return {}, None
    load.check_format(load_format, directory)
    before = stable_identities(directory)
    checkpoint = load.open_checkpoint(directory)
    own = {file: identity_of(file) for file in checkpoint.files} if checkpoint.scratch else {}
    return before | own, checkpoint


def check_checkpoint(checkpoint: Checkpoint, weights: Weights) -> Checkpoint:
    """Raise CheckpointError unless it has all tensors of the model, in shape and a float dtype, and no others.

    Returns the checkpoint as this rank reads it: all of it, or its parts.
    """
    own = own_parts(checkpoint, weights.layout.cuts)
    load.check_tensors(own, weights)
    known = weights.layout.places.keys() | weights.layout.ignored | checkpoint.spent
    unexpected = sorted(name for name in checkpoint.tensors if name not in known and not name.endswith(TABLES))
    if unexpected:
        raise CheckpointError(f"the model has no use for {load.tensor_list(unexpected)} of the checkpoint")
    ties.check_ties(checkpoint, weights.layout)
    return own


def stage_checkpoint(checkpoint: Checkpoint, before: Identities, target: Weights, digests: Manifest | None) -> None:
    """Copy all tensors to their places in `target`. Raises CheckpointError; the contents are undefined then."""
    names_read = (target.names().keys() - checkpoint.quantized.keys()) | ({} if digests is None else digests).keys()
    names = sorted(names_read, key=lambda name: checkpoint.tensors[name].offset)
    for file in with_progress(checkpoint.files):
        own = [name for name in names if checkpoint.tensors[name].file == file]
        if target.device.type == "cuda" and not target.layout.cuts:
            digest = None if digests is None else functools.partial(manifest.check_digest, digests)
            device_staging.read_to_device(checkpoint, own, target, digest)
        else:
            stage_file(file, before.get(file), own, checkpoint, target, digests)
        if before.get(file) != FileIdentity.of(stat_file(file)):
            raise CheckpointError(f"{file} was changed while it was read")
    stage_quantized(checkpoint, before, target)


def stage_quantized(checkpoint: Checkpoint, before: Identities, target: Weights) -> None:
    """Read the tensors that are made of several stored ones. Raises CheckpointError."""
    for name in sorted(target.names().keys() & checkpoint.quantized.keys()):
        reading.read_quantized(name, checkpoint.quantized[name], target, STAGED_VALUES, yield_point)
    for file in checkpoint.files if checkpoint.quantized else []:
        if before.get(file) != FileIdentity.of(stat_file(file)):
            raise CheckpointError(f"{file} was changed while it was read")


def stage_file(
    file: Path,
    before: FileIdentity | None,
    names: list[str],
    checkpoint: Checkpoint,
    target: Weights,
    digests: Manifest | None,
) -> None:
    """Copy the tensors of one file to buffers on the host. Raises CheckpointError."""
    with open_file(file) as descriptor:
        for name in names:
            digest = xxhash.xxh3_64() if digests is not None and name in digests else None
            stored = checkpoint.tensors[name]
            has_place = name in target.layout.places and name not in checkpoint.quantized
            if has_place and target.quantized_of(name) is not None:
                storage.read_numbers(name, stored, target, descriptor, yield_point, digest)
            else:
                place = target.view(name) if has_place else None
                stage_stored(name, stored, place, descriptor, digest)
            if digests is not None and digest is not None:
                manifest.check_digest(digests, name, digest.hexdigest())
        if before != FileIdentity.of(os.fstat(descriptor)):
            raise CheckpointError(f"{file} was changed while it was read")


def stage_stored(
    name: str, stored: StoredTensor, place: torch.Tensor | None, descriptor: int, digest: "xxhash.xxh3_64 | None"
) -> None:
    """Read, check and convert one tensor; without a place it is only read and hashed. Raises CheckpointError."""
    for values, placed in read_chunks(stored, place, descriptor, CHUNK_BYTES):
        yield_point()
        if digest is not None:
            digest.update(bytes_of(values))
        if placed is not None and stored.encoding is None:
            check_finite(name, values)
        if placed is not None and placed is not values:
            check_finite(name, placed)  # a large value may have no counterpart in the served dtype


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raise CheckpointError for NaN and infinities, which always show in the minimum or the maximum."""
    if not values.numel():
        return
    least, largest = values.aminmax()
    if not (torch.isfinite(least) and torch.isfinite(largest)):
        raise CheckpointError(f"tensor {name} holds values that are not finite")


def stage_tensor(name: str, values: torch.Tensor, target: Weights) -> None:
    """Copy one whole tensor that is in memory to its place. Raises CheckpointError."""
    shape = target.layout.whole_shape(name)
    if tuple(values.shape) != shape:
        raise CheckpointError(f"tensor {name} has shape {list(values.shape)}, the model needs {list(shape)}")
    if not values.dtype.is_floating_point:
        raise CheckpointError(f"tensor {name} is {values.dtype}, which is not supported")
    with target.writing(name, yield_point) as place:
        place.copy_(target.layout.own_part(name, values))
        check_finite(name, place)


@contextlib.contextmanager
def copy_stream(device: torch.device) -> Iterator[None]:
    """On a GPU: copy on a stream of its own, after what the model was given so far."""
    if device.type != "cuda":
        yield
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
