"""The language model inside a checkpoint that has parts for images: its tensors' names."""

import logging
from collections.abc import Collection
from dataclasses import replace

from quartet.runtime.model_files.towers import TOWERS
from quartet.scheduler_service.model.spec import DecoderSpec

log = logging.getLogger(__name__)

OWN = ("embed_tokens", "layers.", "norm.", "per_layer_", "altup_")  # what the names of a decoder's tensors begin with
PREFIXES = ("language_model.model.", "model.language_model.", "model.")  # of the decoder's tensors
HEADS = ("language_model.lm_head.weight", "lm_head.weight")


def inside(spec: DecoderSpec, architecture: str, tensors: Collection[str]) -> DecoderSpec:
    """The spec of a language model, with the names that it has in a checkpoint of `architecture`.

    All other tensors are left alone; of a model of text alone those of layers that predict further tokens.
    """
    if architecture not in TOWERS:
        return replace(spec, ignored=frozenset(name for name in tensors if name.startswith(unread(spec))))
    prefix = next((start for start in PREFIXES if f"{start}embed_tokens.weight" in tensors), spec.prefix)
    head = HEADS[0] if HEADS[0] in tensors or prefix == PREFIXES[0] else HEADS[1]
    own = (*(f"{prefix}{part}" for part in OWN), head)
    dropped = unread(replace(spec, prefix=prefix))
    others = frozenset(name for name in tensors if not name.startswith(own))
    log.warning(
        "%s: only its language model is served, %d tensors of other parts are left out, and images are refused.",
        architecture,
        len(others),
    )
    ignored = others | {name for name in tensors if name.startswith(dropped)}
    return replace(spec, prefix=prefix, head=head, ignored=ignored)


def unread(spec: DecoderSpec) -> tuple[str, ...]:
    """What the names of tensors begin with that a language model has and does not need.

    They are those of layers that predict tokens beyond the next one, and of keys and values that a layer takes from
    another one.
    """
    first, found = len(spec.layers), ["mtp."]
    found += [f"{spec.prefix}layers.{layer}." for layer in range(first, first + spec.extra_layers)]
    for layer, own in enumerate(spec.layers):
        names = spec.names_of(layer)
        inside = f"{spec.prefix}layers.{layer}.{names.attention}."
        if own.reads is not None:
            found += [f"{inside}{name}." for name in (*names.qkv[1:], names.key_norm, "v_norm")]
    return tuple(found)
