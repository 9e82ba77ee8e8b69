"""Which weights were committed last: one small file in the run directory, replaced as a whole.

A scheduler that is started again in the same boot loads these. Weights that came over the wire are on no disk: they
are recorded with the checkpoint they were laid over, and are gone after a restart; the file says so. Trainers write to
the same directory again and again: what was rewritten since is served under another version, for it is another.
"""

import logging
from pathlib import Path

import msgspec

from quartet.runtime import records
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.weights.pickled import pickled_files

log = logging.getLogger(__name__)

NAME = "weights.json"
REWRITTEN = "{}-rewritten"  # the version of a directory that has changed since that version was read from it


class Committed(msgspec.Struct, kw_only=True):
    """The weights that serve."""

    model_path: str  # as the client named it
    model_dir: str  # where that was found
    weight_version: str  # what the weights of that directory are called
    load_format: str = "auto"
    files: dict[str, list[int]] = {}  # name → size and time of change (ns), as they were read
    patched: bool = False  # later updates came over the wire, not from that directory, and have labels of their own


def write(run_dir: str, committed: Committed) -> None:
    """Replace the record. Raises OSError."""
    records.write(run_dir, NAME, committed)


def read(run_dir: str) -> Committed | None:
    """What was committed last in this boot, if anything was."""
    return records.read(run_dir, NAME, Committed)


def files_of(directory: Path) -> dict[str, list[int]]:
    """The checkpoint's files as `Committed.files` has them."""
    files = pickled_files(directory) or sorted(directory.glob("*.safetensors"))
    found = {path.name: path.stat() for path in files if path.exists()}
    return {name: [status.st_size, status.st_mtime_ns] for name, status in found.items()}


def restored(config: ServerConfig, run_dir: str) -> ServerConfig:
    """The configuration of a scheduler that is started (again): it names the weights that were committed last.

    Raises StartupError when these are gone.
    """
    committed = read(run_dir)
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
    )
