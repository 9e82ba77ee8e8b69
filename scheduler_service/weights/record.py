"""Records which weights serve, in one small file of the run directory that is replaced as a whole.

A scheduler that is restarted in the same boot loads these. Weights that came in requests are not on disk: after a
restart the checkpoint that they updated serves again, and the record says so. Trainers often write new weights to the
same directory: if it was rewritten since, it is served under another version.
"""

import logging
from pathlib import Path

import msgspec

from quartet.runtime import records
from quartet.runtime.config import ResolvedConfig, WeightScheme
from quartet.runtime.control import REWRITTEN
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.weights.formats import weight_files

log = logging.getLogger(__name__)

NAME = "weights.json"


class Committed(msgspec.Struct, kw_only=True):
    """The weights that serve."""

    model_path: str  # as the client named it
    model_dir: str  # where that was found
    weight_version: str  # what the weights of that directory are called
    load_format: str = "auto"
    files: dict[str, list[int]] = {}  # name → size and time of change (ns), as they were read
    schemes: list[WeightScheme] | None = None  # of the quantized weights
    patched: bool = False  # later updates came in requests, not from that directory; their versions are not recorded


def write_record(run_dir: str, committed: Committed) -> None:
    """Replace the record. Raises OSError."""
    records.write(run_dir, NAME, committed)


def read_record(run_dir: str) -> Committed | None:
    """The record of this boot, if there is one."""
    return records.read_record(run_dir, NAME, Committed)


def files_of(directory: Path) -> dict[str, list[int]]:
    """The checkpoint's files as `Committed.files` has them."""
    found = {str(path.relative_to(directory)): path.stat() for path in weight_files(directory) if path.exists()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def restored(config: ResolvedConfig, run_dir: str) -> ResolvedConfig:
    """The configuration with the recorded weights, for a scheduler that is started or restarted.

    Raises StartupError when these weights do not exist any more.
    """
    committed = read_record(run_dir)
    if committed is None:
        return config
    version, files = committed.weight_version, files_of(Path(committed.model_dir))
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
