"""Stage: bring new values into a second set of buffers, and find everything that is wrong with them on the way.

Nothing here touches what is served. Files are read in chunks; each chunk is looked at while it is in the cache: is
it finite, does it hash as the manifest says. A file must be the same, by identity, size and times, from before its
header was parsed until after its last byte was read.
"""

import contextlib
import functools
import os
import stat
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple, ParamSpec, TypeVar

import torch
import xxhash

from quartet.runtime.model_files.files import open_regular
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights import device_staging, load, manifest, ties
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    Checkpoint,
    CheckpointError,
    StoredTensor,
    bytes_of,
    read_exactly,
)
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.pickled import pickled_files
from quartet.scheduler_service.weights.progress import shown

CHUNK_BYTES = 1 << 20  # a turn's share of work is checked between two
SETTLED_S = 0.05
HARMLESS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")  # tables, not weights

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


class Identity(NamedTuple):
    """What changes when a file is written to or replaced."""

    device: int
    inode: int
    size: int
    written_ns: int
    changed_ns: int


Identities = dict[Path, Identity]


def on_one_thread(work: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Leave the other cores to the steps, in whatever thread this is called."""

    @functools.wraps(work)
    def run(*arguments: Arguments.args, **named: Arguments.kwargs) -> Result:
        torch.set_num_threads(1)  # of this thread alone
        with torch.no_grad():
            return work(*arguments, **named)

    return run


def identity(status: os.stat_result) -> Identity:
    return Identity(status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)


def identities(directory: Path) -> Identities:
    """All files of a directory's weights, once they have not been written to for a moment.

    Times on disk advance in steps: a file written to within the same step as now could be written to again unseen.
    Raises CheckpointError for what is being written, or is no regular file.
    """
    found = looked_at(directory)
    newest_s = max((status.st_mtime for status in found.values()), default=0.0)
    if 0 <= (age_s := time.time() - newest_s) < SETTLED_S:
        time.sleep(SETTLED_S - age_s)
    again = {path: identity(status) for path, status in looked_at(directory).items()}
    for path, status in found.items():
        if again.get(path) != identity(status):
            raise CheckpointError(f"{path} is being written")
    return again


def looked_at(directory: Path) -> dict[Path, os.stat_result]:
    found = {}
    for path in pickled_files(directory) or sorted(directory.glob("*.safetensors")):
        try:
            found[path] = path.stat()
        except OSError as error:
            raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
        if not stat.S_ISREG(found[path].st_mode):
            raise CheckpointError(f"{path} is no regular file")
    return found


def check(checkpoint: Checkpoint, weights: Weights) -> None:
    """All tensors of the model, in shape and a floating dtype, and no others. Raises CheckpointError."""
    load.check(checkpoint, weights)
    known = weights.layout.places.keys() | weights.layout.ignored
    unexpected = sorted(name for name in checkpoint.tensors if name not in known and not name.endswith(HARMLESS))
    if unexpected:
        raise CheckpointError(f"the model has no use for {load.some(unexpected)} of the checkpoint")
    ties.check(checkpoint, weights.layout)


def read(checkpoint: Checkpoint, before: Identities, target: Weights, digests: Manifest | None) -> None:
    """Copy all tensors to their places in `target`. Raises CheckpointError; the contents are undefined then."""
    wanted = target.names().keys() | ({} if digests is None else digests).keys()
    names = sorted(wanted, key=lambda name: checkpoint.tensors[name].offset)
    if target.device.type == "cuda":
        read_to_device(checkpoint, before, names, target, digests)
        return
    with beside_the_model(target.device):
        for file in shown(checkpoint.files):
            own = [name for name in names if checkpoint.tensors[name].file == file]
            read_file(file, before.get(file), own, checkpoint, target, digests)


def read_to_device(
    checkpoint: Checkpoint, before: Identities, names: list[str], target: Weights, digests: Manifest | None
) -> None:
    """The same for buffers on a GPU."""
    digest = None if digests is None else functools.partial(manifest.check_listed, digests)
    for file in shown(checkpoint.files):
        own = [name for name in names if checkpoint.tensors[name].file == file]
        device_staging.read(checkpoint, own, target, digest)
        if before.get(file) != identity(file.stat()):
            raise CheckpointError(f"{file} was changed while it was read")


def read_file(
    file: Path,
    before: Identity | None,
    names: list[str],
    checkpoint: Checkpoint,
    target: Weights,
    digests: Manifest | None,
) -> None:
    try:
        descriptor = open_regular(file)
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    try:
        for name in names:
            digest = xxhash.xxh3_64() if digests is not None and name in digests else None
            place = target.view(name) if name in target.layout.places else None
            read_tensor(name, checkpoint.tensors[name], place, descriptor, digest)
            if digests is not None and digest is not None:
                manifest.check_digest(digests, name, digest.hexdigest())
        if not before == identity(os.fstat(descriptor)) == identity(file.stat()):
            raise CheckpointError(f"{file} was changed while it was read")
    except OSError as error:
        raise CheckpointError(f"cannot read {file}: {error.strerror}") from error
    finally:
        os.close(descriptor)


def read_tensor(
    name: str, stored: StoredTensor, place: torch.Tensor | None, descriptor: int, digest: "xxhash.xxh3_64 | None"
) -> None:
    """Read, check and convert one tensor, chunk by chunk; without a place it is only read and hashed."""
    dtype = DTYPES.get(stored.dtype, torch.uint8)
    count = stored.nbytes // dtype.itemsize
    flat = torch.empty(0) if place is None else place.view(-1)
    direct = place is not None and place.device.type == "cpu" and place.dtype == dtype
    per_chunk = CHUNK_BYTES // dtype.itemsize
    scratch = torch.empty(0 if direct else min(count, per_chunk), dtype=dtype)
    for start in range(0, count, per_chunk):
        yield_point()
        part = flat[start : start + per_chunk]
        chunk = part if direct else scratch[: min(per_chunk, count - start)]
        read_exactly(descriptor, bytes_of(chunk), stored.offset + start * dtype.itemsize, stored.file)
        if digest is not None:
            digest.update(bytes_of(chunk))
        if place is None:
            continue
        check_finite(name, chunk)
        if not direct:
            part.copy_(chunk)
            check_finite(name, part)  # a large value may have no counterpart in the served dtype


def check_finite(name: str, values: torch.Tensor) -> None:
    """Raise CheckpointError for NaN and infinities, which a minimum and a maximum cannot hide."""
    if not values.numel():
        return
    least, largest = values.aminmax()
    if not (torch.isfinite(least) and torch.isfinite(largest)):
        raise CheckpointError(f"tensor {name} holds values that are not finite")


def put(name: str, values: torch.Tensor, target: Weights) -> None:
    """Copy one whole tensor that came in memory to its place. Raises CheckpointError."""
    place = target.view(name)
    if tuple(values.shape) != tuple(place.shape):
        raise CheckpointError(f"tensor {name} has shape {list(values.shape)}, the model needs {list(place.shape)}")
    if not values.dtype.is_floating_point:
        raise CheckpointError(f"tensor {name} is {values.dtype}, which is not supported")
    place.copy_(values)
    check_finite(name, place)


@contextlib.contextmanager
def beside_the_model(device: torch.device) -> Iterator[None]:
    """On a GPU: copy on a stream of its own, behind what the model has been given so far."""
    if device.type != "cuda":
        yield
        return
    stream: torch.cuda.Stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.default_stream(device))
    with torch.cuda.stream(stream):
        yield
    stream.synchronize()
