"""Whether the config.json beside new weights describes the model that serves.

Shapes do not tell: another base of the rotary frequencies or another epsilon makes another model of the same tensors.
What is compared is what the configs mean, not how they are written, for trainers save them in forms of their own.
"""

from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import model_info
from quartet.runtime.model_files.files import present
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.model_files.model_ranges import FIELDS, ROPES
from quartet.runtime.shorten import short
from quartet.scheduler_service.model.embedders import encoder_spec
from quartet.scheduler_service.model.encoder_spec import EncoderSpec
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.spec import DecoderSpec, NotNative
from quartet.scheduler_service.weights.checkpoint import CheckpointError

Spec = DecoderSpec | EncoderSpec

# field of a spec → the fields of config.json that it comes from
SOURCES: dict[str, tuple[str, ...]] = {
    "heads": ("num_attention_heads", "n_heads"),
    "kv_heads": ("num_key_value_heads", "num_attention_heads"),
    "attention_scale": ("query_pre_attn_scalar", "attention_multiplier", "head_dim"),
    "embedding_scale": ("embedding_multiplier", "residual_multiplier", "hidden_size"),
    "logit_scale": ("logits_scaling", "logit_scale"),
    "query_scale": ROPES,
    "layer_inputs": ("hidden_size_per_layer_input", "vocab_size_per_layer_input"),
    "streams": ("altup_num_inputs", "altup_active_idx", "altup_correct_scale", "laurel_rank"),
    "ropes": ("rope_theta", *ROPES, "partial_rotary_factor", "rope_local_base_freq", "max_position_embeddings"),
    "norm_epsilon": ("rms_norm_eps", "layer_norm_eps", "norm_eps", "residual_multiplier"),
    "activation": ("hidden_act", "hidden_activation", "activation"),
    "attention_softcap": ("attn_logit_softcapping",),
    "logit_softcap": ("final_logit_softcapping",),
    "moe": ("num_experts", "moe_top_k"),
    "tasks": ("lora_adaptations", "lora_rank", "lora_alpha"),
    "relative": (
        "position_buckets",
        "max_relative_positions",
        "pos_att_type",
        "norm_rel_ebd",
        "max_position_embeddings",
    ),
    "qkv_bias": ("attention_bias", "qkv_bias", "use_bias"),
    "output_bias": ("attention_bias", "attention_out_bias", "use_bias"),
    "layers": (
        "num_hidden_layers",
        "sliding_window",
        "layer_types",
        "use_sliding_window",
        "max_window_layers",
        "num_experts",
        "num_local_experts",
        "num_experts_per_tok",
        "norm_topk_prob",
        *("moe_intermediate_size", "moe_every_n_layers"),
        *("n_routed_experts", "n_shared_experts", "n_group", "topk_group", "routed_scaling_factor"),
        *("first_k_dense_replace", "no_rope_layers", "sliding_window_pattern"),
        *("global_head_dim", "num_global_key_value_heads", "per_layer_config", "num_kv_shared_layers"),
        *("attention_k_eq_v", "use_double_wide_mlp", "activation_sparsity_pattern", "intermediate_size"),
    ),
}
FREE = ("tied", "prefix", "head", "ignored")  # the tensors tell
NOT_THE_MODEL = frozenset(
    {
        *("architectures", "torch_dtype", "dtype", "max_position_embeddings", "n_positions", "id2label"),
        *("bos_token_id", "eos_token_id", "pad_token_id", "tie_word_embeddings", "sentence_transformers"),
    }
)


def check_same_model(served: ModelInfo, config: ServerConfig, directory: Path) -> None:
    """Raise CheckpointError, with the field and both values, where a directory's config.json is of another model."""
    if not present(directory / "config.json"):
        return
    there = msgspec.structs.replace(
        config, model_path=str(directory), model_dir=str(directory), tokenizer_dir="", context_length=None
    )
    try:
        new = model_info.load(there)
        new = msgspec.structs.replace(new, context_length=served.context_length)
        difference = next(differences(served, new), None)
    except StartupError as error:
        raise CheckpointError(str(error)) from error
    if difference is not None:
        name, old, now = difference
        raise CheckpointError(
            f"config.json of the new weights says {name} is {short(now)}, the model that serves has {short(old)}"
        )


def differences(served: ModelInfo, new: ModelInfo) -> Iterator[tuple[str, Any, Any]]:
    """(name of the field, value that serves, new value), in no order that means something."""
    if new.architecture and new.architecture != served.architecture:
        yield "architectures", served.architecture, new.architecture
        return
    try:
        old_spec, new_spec = spec_of(served), spec_of(new)
    except NotNative:
        yield from written_differently(served.config, new.config)
        return
    for field in fields(old_spec):
        old, now = getattr(old_spec, field.name), getattr(new_spec, field.name)
        if field.name not in FREE and old != now:
            yield named(field.name, old, now, served.config, new.config)


def spec_of(info: ModelInfo) -> Spec:
    """Raises NotNative for what transformers' own code serves."""
    if info.embedding is not None and info.embedding.encoder:
        return encoder_spec(info, ())
    return decoder_spec(info)


def named(field: str, old: Any, now: Any, old_config: Any, new_config: Any) -> tuple[str, Any, Any]:
    """What of the configs makes a spec's field differ; the field itself where nothing written does."""
    for name in SOURCES.get(field, (field,)):
        if old_config.get(name) != new_config.get(name):
            return name, old_config.get(name), new_config.get(name)
    return field, old, now


def written_differently(old: Any, new: Any) -> Iterator[tuple[str, Any, Any]]:
    """Listed fields that both configs have, with other values."""
    for name in FIELDS:
        if name not in NOT_THE_MODEL and None not in (old.get(name), new.get(name)) and old[name] != new[name]:
            yield name, old[name], new[name]
