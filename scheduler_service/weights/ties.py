"""Tied tensors: what a checkpoint says about the head and the embeddings, whatever its config claims.

Configs are wrong often: a fine-tune has a head of its own under a config that says tied, or a checkpoint saved as tied
has a config that does not say so. The tensors decide. As in transformers, two that are there and differ are not tied;
one that is missing is the other.
"""

import logging
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import torch

from quartet.runtime.model_files.files import opened
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor, read_exactly
from quartet.scheduler_service.weights.parameters import Layout
from quartet.scheduler_service.weights.pickled import checkpoint_of

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
DIFFERENT = (
    "tensor {alias} differs from {name}, but the model that serves has one tensor for both; start a server with "
    "this checkpoint to serve it"
)


def is_tied(directory: Path, head: str, embeddings: str, tied_by_config: bool) -> bool:
    """Whether the tensors of these two names are one in the checkpoint. Raises CheckpointError."""
    tensors = checkpoint_of(directory).tensors
    if embeddings not in tensors:
        return tied_by_config
    if not tied_by_config and head not in tensors:
        log.warning("config.json does not say so, but the model is tied: the checkpoint has no %s.", head)
        return True
    if tied_by_config and head in tensors and not same_values(tensors[head], tensors[embeddings]):
        log.warning("config.json says that the model is tied, but %s has values of its own: they are used.", head)
        return False
    return tied_by_config


def completed(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """The checkpoint with each tensor that the model needs and that is missing taken from the one it is tied to."""
    tensors = dict(checkpoint.tensors)
    for alias, name in layout.ties.items():
        for needed, other in ((alias, name), (name, alias)):
            if needed in layout.places and needed not in tensors and other in tensors:
                log.warning("The checkpoint has no %s: %s is used.", needed, other)
                tensors[needed] = tensors[other]
    return replace(checkpoint, tensors=tensors)


def check(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise CheckpointError where one tensor of the model would have to be two."""
    for alias, name in layout.ties.items():
        both = checkpoint.tensors.get(alias), checkpoint.tensors.get(name)
        if alias not in layout.places and both[0] and both[1] and not same_values(both[0], both[1]):
            raise CheckpointError(DIFFERENT.format(alias=alias, name=name))


def check_values(alias: str, values: torch.Tensor, name: str, served: torch.Tensor) -> None:
    """The same for a tensor that came over the wire and the one that will serve."""
    if values.shape != served.shape or not torch.equal(values.to(served.device, served.dtype), served):
        raise CheckpointError(DIFFERENT.format(alias=alias, name=name))


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, byte for byte."""
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with ExitStack() as stack:
        descriptors = [stack.enter_context(opened(stored.file)) for stored in (one, other)]
        buffers = [bytearray(min(one.nbytes, CHUNK_BYTES)) for _ in descriptors]
        for start in range(0, one.nbytes, CHUNK_BYTES):
            yield_point()
            size = min(CHUNK_BYTES, one.nbytes - start)
            for stored, descriptor, buffer in zip((one, other), descriptors, buffers, strict=True):
                read_exactly(descriptor, memoryview(buffer)[:size], stored.offset + start, stored.file)
            if buffers[0] != buffers[1]:
                return False
    return True
