"""Tied tensors: whether the head and the embeddings of a checkpoint are one. The tensors decide, not config.json.

Configs are often wrong: a fine-tune has a head of its own although its config says tied, or a checkpoint was saved as
tied and its config does not say so. As in transformers, two tensors that are both there and differ are not tied; one
that is missing equals the other.
"""

import logging
from dataclasses import replace
from pathlib import Path

import torch

from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from quartet.scheduler_service.weights.formats import checkpoint_of
from quartet.scheduler_service.weights.parameters import Layout
from quartet.scheduler_service.weights.tensor_io import open_file, read_chunks

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20
DIFFERENT = (
    "tensor {alias} differs from {name}, but the model that serves has one tensor for both; start a server with "
    "this checkpoint to serve it"
)


def is_tied(directory: Path, head: str, embeddings: str, tied_by_config: bool) -> bool:
    """Whether the tensors of these two names are one in the checkpoint. Raises CheckpointError."""
    checkpoint = checkpoint_of(directory)
    tensors = checkpoint.tensors
    if head in checkpoint.quantized:
        return False
    if embeddings not in tensors:
        return tied_by_config
    if not tied_by_config and head not in tensors:
        log.warning("config.json does not say so, but the model is tied: the checkpoint has no %s.", head)
        return True
    if tied_by_config and head in tensors and not same_values(tensors[head], tensors[embeddings]):
        log.warning("config.json says that the model is tied, but %s has values of its own: they are used.", head)
        return False
    return tied_by_config


def with_tied_tensors(checkpoint: Checkpoint, layout: Layout) -> Checkpoint:
    """The checkpoint, in which a missing tensor that the model needs is the one it is tied to."""
    tensors = dict(checkpoint.tensors)
    for alias, name in layout.ties.items():
        for needed, other in ((alias, name), (name, alias)):
            missing = needed not in tensors and needed not in checkpoint.quantized
            if needed in layout.places and missing and other in tensors:
                log.warning("The checkpoint has no %s: %s is used.", needed, other)
                tensors[needed] = tensors[other]
    return replace(checkpoint, tensors=tensors)


def check_ties(checkpoint: Checkpoint, layout: Layout) -> None:
    """Raise CheckpointError where the checkpoint has two different tensors for one of the model."""
    for alias, name in layout.ties.items():
        both = checkpoint.tensors.get(alias), checkpoint.tensors.get(name)
        if alias not in layout.places and both[0] and both[1] and not same_values(both[0], both[1]):
            raise CheckpointError(DIFFERENT.format(alias=alias, name=name))


def check_tied_values(alias: str, values: torch.Tensor, name: str, served: torch.Tensor) -> None:
    """The same for a tensor that came in a request and the one that will serve."""
    if values.shape != served.shape or not torch.equal(values.to(served.device, served.dtype), served):
        raise CheckpointError(DIFFERENT.format(alias=alias, name=name))


def same_values(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two stored tensors are equal, byte for byte. Raises CheckpointError."""
    if (one.dtype, one.shape, one.encoding) != (other.dtype, other.shape, other.encoding):
        return False
    with open_file(one.file) as first, open_file(other.file) as second:
        chunks = zip(
            read_chunks(one, None, first, CHUNK_BYTES), read_chunks(other, None, second, CHUNK_BYTES), strict=True
        )
        for (values, _), (other_values, _) in chunks:
            yield_point()
            if not torch.equal(values.view(torch.uint8), other_values.view(torch.uint8)):
                return False
    return True
