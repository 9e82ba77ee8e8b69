"""Reads the weights that serve once more, for a server that has given their memory back."""

from pathlib import Path

import msgspec

from quartet.scheduler_service.weights import pickled, record, staging
from quartet.scheduler_service.weights.refusals import NOT_LOADED, NOT_OPENED, refused_as
from quartet.scheduler_service.weights.staging import on_one_thread
from quartet.scheduler_service.weights.update import Staged, Updates


@on_one_thread
def reread(updates: Updates) -> Staged:
    """The committed checkpoint, staged for a swap. Runs in the background. Raises CommandRefused."""
    committed = updates.committed
    directory = Path(committed.model_dir)
    try:
        with refused_as(NOT_OPENED):
            before, checkpoint = staging.open_checkpoint(directory, committed.load_format)
        with refused_as(NOT_LOADED):
            updates.fill(checkpoint, before, None)
    finally:
        pickled.forget_converted()
    files = record.files_of(directory) if committed.files else {}
    return updates.packed(frozenset(updates.live.names()), msgspec.structs.replace(committed, files=files))
