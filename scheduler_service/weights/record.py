"""Records which weights serve, in one small file of the run directory that is replaced as a whole.

A scheduler that is restarted in the same boot loads these. Weights that came in requests are not on disk: after a
restart the checkpoint that they updated serves again, and the record says so. Trainers often write new weights to the
same directory: if it was rewritten since, it is served under another version. What is read at the start of the server
is recorded before it is read, by the first of several schedulers for all.
"""

import hashlib
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from quartet.runtime import records
from quartet.runtime.config import ResolvedConfig, WeightScheme
from quartet.runtime.control import REWRITTEN
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.weights.formats import weight_files

log = logging.getLogger(__name__)

NAME = "weights.json"
FIRST = "first_weights.json"  # of all schedulers of the server
DUMMY = "dummy"  # the load format that reads no file
QUIET_S = 3.0  # files that were not written to for so long are complete
MOST_WAIT_S = 60.0  # for that

Files = dict[str, list[int]]  # name → size and time of change (ns), as they were read


class Committed(msgspec.Struct, kw_only=True):
    """The weights that serve."""

    model_path: str  # as the client named it
    model_dir: str  # where that was found
    weight_version: str  # what the weights of that directory are called
    load_format: str = "auto"
    files: Files = {}
    schemes: list[WeightScheme] | None = None  # of the quantized weights
    patched: bool = False  # later updates came in requests, not from that directory; their versions are not recorded

    @classmethod
    def at_start(cls, config: ResolvedConfig) -> "Committed":
        """What a scheduler loads, with the files that are there now. Raises CheckpointError."""
        return cls(
            model_path=config.model_path,
            model_dir=config.model_dir,
            weight_version=config.weight_version,
            load_format=config.load_format,
            files={} if config.load_format == DUMMY else files_of(Path(config.model_dir)),
            schemes=config.weight_schemes,
        )

    @property
    def weight_files(self) -> str:
        """A name for what was read: equal where the files were; "" where there were none."""
        content = msgspec.json.encode(self.files, order="deterministic")
        return hashlib.blake2b(content, digest_size=8).hexdigest() if self.files else ""

    @property
    def told(self) -> dict[str, Any]:
        """What the gateway has to know."""
        return {"model_path": self.model_path, "weight_files": self.weight_files}


def write_record(run_dir: str, committed: Committed) -> None:
    """Replace the record. Raises OSError."""
    records.write(run_dir, NAME, committed)


def read_record(run_dir: str) -> Committed | None:
    """The record of this boot, if there is one."""
    return records.read_record(run_dir, NAME, Committed)


def files_of(directory: Path) -> Files:
    """The checkpoint's files as `Committed.files` has them. Raises CheckpointError."""
    found = {str(path.relative_to(directory)): path.stat() for path in weight_files(directory) if path.exists()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def begin(config: ResolvedConfig, own_dir: str, run_dir: str) -> None:
    """Record what is about to be read, where this scheduler has not read anything yet. Raises CheckpointError.

    Where files are written to while several schedulers start, those that read other files than the first one see it.
    """
    if (committed := read_record(own_dir)) is not None:
        wait_until_written(committed)
        return
    try:
        records.write_first(run_dir, FIRST, Committed.at_start(config))
        first = records.read_record(run_dir, FIRST, Committed)
        assert first is not None, "somebody has written it"
        write_record(own_dir, first)
    except OSError as error:
        log.error("The weights that are read could not be recorded: %s. If rewritten, they keep their version.", error)


def wait_until_written(
    known: Committed, now: Callable[[], float] = time.time, sleep: Callable[[float], None] = time.sleep
) -> None:
    """Return once files that are others than the known ones have not been written to for a while.

    A trainer may be saving to the directory: each file that changes while it is read costs one more start.
    """
    until = now() + MOST_WAIT_S
    while known.files and (files := files_of(Path(known.model_dir))) not in ({}, known.files):
        age_s = now() - max(written_ns for _, written_ns in files.values()) / 1e9
        if not 0 <= age_s < QUIET_S or now() >= until:
            return
        sleep(QUIET_S / 10)


def check_unchanged(before: Committed, started: ResolvedConfig, run_dir: str) -> None:
    """Raise StartupError where files were written to while they were read. `before`: what `restored` has led to."""
    if Committed.at_start(restored(started, run_dir)) != before:
        raise StartupError(f"{before.model_dir} was written to while its weights were read; start again behind that")


def restored(config: ResolvedConfig, run_dir: str) -> ResolvedConfig:
    """The configuration with the recorded weights, for a scheduler that is started or restarted.

    Raises StartupError when these weights do not exist any more.
    """
    committed = read_record(run_dir)
    if committed is None:
        return config
    version = committed.weight_version
    files = files_of(Path(committed.model_dir)) if committed.files else {}
    if committed.files and not files:
        raise StartupError(
            f"the weights that served last (version {version}) are no longer in {committed.model_dir}; keep a "
            "checkpoint until the next update has been answered"
        )
    if committed.files and files != committed.files:
        log.error("%s was rewritten since version %s was read from it.", committed.model_dir, version)
        version = REWRITTEN.format(version)
    if committed.patched:
        log.warning("Weights that came over the wire are lost; serving those of %s again.", committed.model_path)
    return msgspec.structs.replace(
        config,
        model_path=committed.model_path,
        model_dir=committed.model_dir,
        weight_version=version,
        load_format=committed.load_format,
        weight_schemes=committed.schemes,
    )
