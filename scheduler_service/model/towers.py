"""The language model inside a checkpoint that has parts for images: its tensors' names."""

import logging
from collections.abc import Collection
from dataclasses import replace

from quartet.runtime.model_files.towers import TOWERS
from quartet.scheduler_service.model.spec import DecoderSpec

log = logging.getLogger(__name__)

PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the decoder's tensors
HEADS = ("language_model.lm_head.weight", "lm_head.weight")


def inside(spec: DecoderSpec, architecture: str, tensors: Collection[str]) -> DecoderSpec:
    """The spec of a language model, with the names that it has in a checkpoint of `architecture`.

    All other tensors are left alone; of a model of text alone those of layers that predict further tokens.
    """
    if architecture not in TOWERS:
        return replace(spec, ignored=frozenset(name for name in tensors if name.startswith(predictors(spec))))
    prefix = next((start for start in PREFIXES if f"{start}embed_tokens.weight" in tensors), spec.prefix)
    head = HEADS[0] if HEADS[0] in tensors or prefix == PREFIXES[0] else HEADS[1]
    own = (f"{prefix}embed_tokens.", f"{prefix}layers.", f"{prefix}norm.", head)
    others = frozenset(name for name in tensors if not name.startswith(own))
    log.warning(
        "%s: only its language model is served, %d tensors of other parts are left out, and images are refused.",
        architecture,
        len(others),
    )
    return replace(spec, prefix=prefix, head=head, ignored=others)


def predictors(spec: DecoderSpec) -> tuple[str, ...]:
    """What the names of layers begin with that predict tokens beyond the next one."""
    first = len(spec.layers)
    return ("mtp.", *(f"{spec.prefix}layers.{layer}." for layer in range(first, first + spec.extra_layers)))
