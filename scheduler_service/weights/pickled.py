"""Checkpoints that torch.save wrote (`pytorch_model*.bin`), used where a directory has no safetensors files.

Such a file is a pickle, so no serving process opens it. A short-lived process does (`convert_bin`), under limits, and
writes safetensors to a temporary file without a name, which disappears when the last descriptor is closed.
"""

import logging
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from quartet.runtime.model_files.files import present
from quartet.runtime.process.python_path import python_path
from quartet.scheduler_service.weights.checkpoint import (
    Checkpoint,
    CheckpointError,
    check_index,
    read_headers,
    read_weight_map,
)
from quartet.scheduler_service.weights.file_identity import FileIdentity, identity_of

log = logging.getLogger(__name__)

CONVERTER = "quartet.scheduler_service.weights.convert_bin"
INDEX_NAME = "pytorch_model.bin.index.json"
SINGLE_NAME = "pytorch_model.bin"
SHARDS = "pytorch_model-*.bin"
MAX_GROWTH = 2  # tied tensors share their bytes in such a file
SPARE_BYTES = 16 << 20
START_S = 120.0  # to start a process that imports torch, on a busy machine
BYTES_PER_S = 10e6  # a slow disk
TOO_MUCH = "reading the *.bin files of {} takes too much memory, time or disk space"
BASE_MEMORY_BYTES = 8 << 30  # of address space, what torch maps for itself


class Scratch:
    """A temporary file without a name; `path` is its descriptor below /proc."""

    def __init__(self) -> None:
        with tempfile.TemporaryFile(prefix="quartet-bin-") as file:
            self.descriptor = os.dup(file.fileno())

    @property
    def path(self) -> Path:
        return Path(f"/proc/self/fd/{self.descriptor}")

    def __del__(self) -> None:
        os.close(self.descriptor)


_converted: dict[Path, tuple[list[FileIdentity], Checkpoint]] = {}  # the last one, if it is opened again


def checkpoint_of(directory: Path) -> Checkpoint:
    """The checkpoint of a directory, in safetensors or *.bin files. Raises CheckpointError."""
    files = pickled_files(directory)
    if not files:
        return Checkpoint.open(directory)
    identities = list(map(identity_of, files))
    known = _converted.get(directory)
    if known is None or known[0] != identities:
        forget_converted()
        _converted[directory] = known = identities, converted(directory, files)
        if identities != list(map(identity_of, files)):
            forget_converted()
            raise CheckpointError(f"a file of {directory} was changed while it was read")
    return known[1]


def forget_converted() -> None:
    """Free the disk space of converted checkpoints, once nothing reads them."""
    _converted.clear()


def pickled_files(directory: Path) -> list[Path]:
    """The pickled files that hold a directory's weights; none where it has safetensors files."""
    if any(directory.glob("*.safetensors")) or any(directory.glob("*.safetensors.index.json")):
        return []
    if weight_map := read_weight_map(directory / INDEX_NAME, ".bin"):
        return [directory / name for name in sorted(set(weight_map.values()))]
    if present(directory / SINGLE_NAME):
        return [directory / SINGLE_NAME]
    return sorted(directory.glob(SHARDS))


def converted(directory: Path, files: list[Path]) -> Checkpoint:
    """The checkpoint that these files hold, as safetensors."""
    log.warning(
        "%s has no safetensors files. Its pickled *.bin files are read by a separate process, which loads tensors only "
        "and takes as much room in %s meanwhile; converting them once to safetensors saves that.",
        directory,
        tempfile.gettempdir(),
    )
    scratches = run_converter(files)
    paths = [scratch.path for scratch in scratches]
    tensors = read_headers(directory, zip(paths, files, strict=True))
    weight_map = read_weight_map(directory / INDEX_NAME, ".bin")
    check_index(directory / INDEX_NAME, weight_map, tensors)
    return Checkpoint(paths, tensors, bool(weight_map), scratch=tuple(scratches))


def run_converter(files: list[Path]) -> list[Scratch]:
    """Have files converted, all by one process. Raises CheckpointError with the reason."""
    try:
        size = sum(file.stat().st_size for file in files)
        scratches = [Scratch() for _ in files]
        pairs = [word for file, own in zip(files, scratches, strict=True) for word in (str(file), str(own.descriptor))]
        done = subprocess.run(
            [sys.executable, "-P", "-m", CONVERTER, str(os.getpid()), *pairs],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            pass_fds=[own.descriptor for own in scratches],
            env=os.environ | {"PYTHONPATH": python_path(os.environ)},
            timeout=2 * time_limit_s(size),
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise CheckpointError(f"the *.bin files of {files[0].parent} took too long to read") from error
    except OSError as error:
        raise CheckpointError(f"cannot convert the *.bin files of {files[0].parent}: {error.strerror}") from error
    if done.returncode:
        reason = done.stdout.decode(errors="replace").strip()
        raise CheckpointError(f"cannot read {reason}" if reason else TOO_MUCH.format(files[0].parent))
    return scratches


def output_limit(size: int) -> int:
    """Bytes of tensors that a file of so many bytes may hold."""
    return MAX_GROWTH * size + SPARE_BYTES


def time_limit_s(size: int) -> float:
    """CPU seconds that reading a file of so many bytes may take."""
    return START_S + size / BYTES_PER_S
