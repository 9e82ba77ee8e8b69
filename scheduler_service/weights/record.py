"""Which weights were committed last: one small file in the run directory, replaced as a whole.

A scheduler that is started again in the same boot loads these. Weights that came over the wire are on no disk: they
are recorded with the checkpoint they were laid over, and are gone after a restart; the file says so.
"""

import logging

import msgspec

from runtime import records
from runtime.config import ServerConfig

log = logging.getLogger(__name__)

NAME = "weights.json"


class Committed(msgspec.Struct, kw_only=True):
    """The weights that serve."""

    model_path: str  # as the client named it
    model_dir: str  # where that was found
    weight_version: str  # what the weights of that directory are called
    load_format: str = "auto"
    patched: bool = False  # later updates came over the wire, not from that directory, and have labels of their own


def write(run_dir: str, committed: Committed) -> None:
    """Replace the record. Raises OSError."""
    records.write(run_dir, NAME, committed)


def read(run_dir: str) -> Committed | None:
    """What was committed last in this boot, if anything was."""
    return records.read(run_dir, NAME, Committed)


def restored(config: ServerConfig, run_dir: str) -> ServerConfig:
    """The configuration of a scheduler that is started (again): it names the weights that were committed last."""
    committed = read(run_dir)
    if committed is None:
        return config
    if committed.patched:
        log.warning("Weights that came over the wire are lost; serving those of %s again.", committed.model_path)
    return msgspec.structs.replace(
        config,
        model_path=committed.model_path,
        model_dir=committed.model_dir,
        weight_version=committed.weight_version,
        load_format=committed.load_format,
    )
