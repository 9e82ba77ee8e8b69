"""How a change of the weights is refused: what the client is told, and which errors are its."""

from collections.abc import Iterator
from contextlib import contextmanager

from quartet.runtime.errors import CommandRefused
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError

NOT_OPENED = "Failed to get weights iterator: {}."
NOT_LOADED = "Failed to update weights: {}.\nRolling back to original weights."
INTERNAL = "Internal error: {}"
NO_LOADER = "Failed to get model loader: {}."
REFUSED_ERRORS = (CheckpointError, OSError, MemoryError, RuntimeError)  # torch: RuntimeError when memory is short


@contextmanager
def refused_as(form: str) -> Iterator[None]:
    """Raise errors of weights, files and memory as CommandRefused, with their reason in this form."""
    try:
        yield
    except REFUSED_ERRORS as error:
        reason = short(str(error).strip().split("\n")[0].rstrip("."), 1000) or type(error).__name__
        raise CommandRefused(form.format(reason)) from error
