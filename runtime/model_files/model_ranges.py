"""What the values of a model's config.json may be: one table, looked at once, before anything is computed from them.

A value of another type or out of its range ends the start with one line that names the field. null counts as absent;
fields that are not listed are not looked at. The ranges are wide: they stop what would hang, fill the memory or
compute nonsense, not what is unusual.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from quartet.runtime.shorten import short

Config = Mapping[str, Any]
MAX_LAYERS = 1024
MAX_POSITIONS = 1 << 30


class BadValue(ValueError):
    """A field of config.json has a value that cannot be; `str(error)` names both."""


@dataclass(frozen=True, slots=True)
class Int:
    """An integer; 4096.0 counts as one."""

    least: int
    most: int

    def __call__(self, value: Any) -> bool:
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        return isinstance(value, int) and not isinstance(value, bool) and self.least <= value <= self.most

    def __str__(self) -> str:
        return f"an integer from {self.least} to {self.most}"


@dataclass(frozen=True, slots=True)
class Number:
    """A finite number."""

    least: float
    most: float

    def __call__(self, value: Any) -> bool:
        return (
            isinstance(value, int | float)
            and not isinstance(value, bool)
            and math.isfinite(value)
            and self.least <= value <= self.most
        )

    def __str__(self) -> str:
        return f"a number from {self.least:g} to {self.most:g}"


@dataclass(frozen=True, slots=True)
class Each:
    """A list, each entry of one kind; `alone`: or one entry by itself."""

    kind: "Kind"
    most: int
    alone: bool = False

    def __call__(self, value: Any) -> bool:
        if self.alone and self.kind(value):
            return True
        return isinstance(value, list) and len(value) <= self.most and all(map(self.kind, value))

    def __str__(self) -> str:
        return f"{self.kind} or a list of such" if self.alone else f"a list of at most {self.most}, each {self.kind}"


@dataclass(frozen=True, slots=True)
class Typed:
    """Any value of a type."""

    type: type
    name: str

    def __call__(self, value: Any) -> bool:
        return isinstance(value, self.type)

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True, slots=True)
class Either:
    """A value of one of two kinds."""

    first: "Kind"
    second: "Kind"

    def __call__(self, value: Any) -> bool:
        return self.first(value) or self.second(value)

    def __str__(self) -> str:
        return f"{self.first} or {self.second}"


Kind = Callable[[Any], bool]
TEXT, BOOLEAN, OBJECT = Typed(str, "a text"), Typed(bool, "true or false"), Typed(dict, "an object")
WIDTH, HEADS, POSITIONS = Int(1, 1 << 22), Int(1, 1 << 14), Int(1, MAX_POSITIONS)
LAYERS, EXPERTS, STEP = Int(1, MAX_LAYERS), Int(0, 1 << 14), Int(1, MAX_LAYERS)
EPSILON, THETA, SCALE = Number(0.0, 1.0), Number(1.0001, 1e15), Number(1e-6, 1e9)
TOKEN_ID = Int(-1, (1 << 31) - 1)
FACTORS = Each(SCALE, 1 << 12)

FIELDS: dict[str, Kind] = {
    "architectures": Each(TEXT, 16),
    "model_type": TEXT,
    "vocab_size": Int(1, 1 << 24),
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "dim", "hidden_dim", "n_inner", "ffn_dim"), WIDTH),
    **dict.fromkeys(("intermediate_size", "moe_intermediate_size"), Each(WIDTH, MAX_LAYERS, alone=True)),
    "shared_expert_intermediate_size": Int(0, 1 << 22),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "head_dim"), HEADS),
    "num_key_value_heads": Each(HEADS, MAX_LAYERS, alone=True),  # in some models each layer has its own
    **dict.fromkeys(
        ("max_position_embeddings", "n_positions", "model_max_length", "original_max_position_embeddings"), POSITIONS
    ),
    **dict.fromkeys(("sliding_window", "max_window_layers"), Int(0, MAX_POSITIONS)),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts", "num_experts_per_tok"), EXPERTS),
    **dict.fromkeys(("n_shared_experts", "n_group", "topk_group"), Int(0, 1 << 10)),
    **dict.fromkeys(("first_k_dense_replace", "no_rope_layer_interval"), Int(0, MAX_LAYERS)),
    **dict.fromkeys(("linear_conv_kernel_dim", "conv_L_cache"), Int(2, 1 << 8)),
    **dict.fromkeys(("linear_num_key_heads", "linear_num_value_heads"), HEADS),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), Int(1, 1 << 12)),
    **dict.fromkeys(("full_attention_interval", "block_multiple_of", "block_ff_dim"), WIDTH),
    "full_attn_idxs": Each(Int(0, MAX_LAYERS), MAX_LAYERS),
    **dict.fromkeys(("swiglu_alpha", "swiglu_limit", "block_ffn_dim_multiplier"), SCALE),
    **dict.fromkeys(("conv_bias", "block_auto_adjust_ff_dim", "rope_interleave", "tie_embedding"), BOOLEAN),
    "no_rope_layers": Each(Int(0, 1), MAX_LAYERS),
    **dict.fromkeys(("rotary_dim", "q_lora_rank", "kv_lora_rank", "qk_rope_head_dim", "v_head_dim"), WIDTH),
    **dict.fromkeys(("qk_nope_head_dim", "num_nextn_predict_layers"), Int(0, 1 << 14)),
    **dict.fromkeys(("decoder_sparse_step", "global_attn_every_n_layers"), STEP),
    "sliding_window_pattern": Either(Int(0, MAX_LAYERS), TEXT),  # a text has a letter for each layer of a period
    "_sliding_window_pattern": STEP,
    "mlp_only_layers": Each(Int(0, MAX_LAYERS), MAX_LAYERS),
    "layer_types": Each(TEXT, MAX_LAYERS),
    **dict.fromkeys(("global_head_dim", "num_global_key_value_heads"), HEADS),
    **dict.fromkeys(("num_kv_shared_layers", "altup_active_idx"), Int(0, MAX_LAYERS)),
    "hidden_size_per_layer_input": Int(0, 1 << 16),
    "vocab_size_per_layer_input": Int(1, 1 << 24),
    "top_k_experts": Int(1, 1 << 14),
    "altup_num_inputs": Int(1, 1 << 6),
    "laurel_rank": WIDTH,
    "activation_sparsity_pattern": Each(Number(0.0, 0.999), MAX_LAYERS),
    **dict.fromkeys(("attention_k_eq_v", "enable_moe_block", "use_double_wide_mlp", "altup_correct_scale"), BOOLEAN),
    "per_layer_config": OBJECT,
    "local_attention": POSITIONS,
    **dict.fromkeys(("position_buckets", "max_relative_positions"), Int(-1, 1 << 16)),
    "relative_attention_num_buckets": Int(1, 1 << 16),
    "pos_att_type": Either(TEXT, Each(TEXT, 16)),
    **dict.fromkeys(("relative_attention", "share_att_key", "position_biased_input"), BOOLEAN),
    **dict.fromkeys(("pooler_hidden_act", "activation_function", "norm_rel_ebd", "classifier_pooling"), TEXT),
    "type_vocab_size": Int(0, 1 << 16),
    "num_labels": Int(1, 1 << 22),
    "matryoshka_dimensions": Each(WIDTH, 1 << 10),
    "truncate_dim": WIDTH,
    **dict.fromkeys(("moe_every_n_layers", "moe_top_k"), Int(0, 1 << 10)),
    "lora_adaptations": Each(TEXT, 64),
    "lora_rank": Int(1, 1 << 12),
    "lora_alpha": SCALE,
    "default_task": TEXT,
    "task_instructions": OBJECT,
    **dict.fromkeys(("bos_token_id", "eos_token_id"), Each(TOKEN_ID, 1 << 10, alone=True)),
    "pad_token_id": TOKEN_ID,
    **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps"), EPSILON),
    **dict.fromkeys(
        ("rope_theta", "rope_local_base_freq", "global_rope_theta", "local_rope_theta", "rotary_emb_base"), THETA
    ),
    "partial_rotary_factor": Number(1e-3, 1.0),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "query_pre_attn_scalar"), SCALE),
    **dict.fromkeys(("hidden_act", "hidden_activation", "activation", "torch_dtype", "dtype"), TEXT),
    **dict.fromkeys(("attention_bias", "mlp_bias", "tie_word_embeddings", "use_sliding_window"), BOOLEAN),
    **dict.fromkeys(("embedding_multiplier", "residual_multiplier", "attention_multiplier"), SCALE),
    **dict.fromkeys(("logits_scaling", "logit_scale", "routed_scaling_factor"), SCALE),
    **dict.fromkeys(("norm_topk_prob", "qkv_bias", "norm_bias", "use_bias"), BOOLEAN),
    **dict.fromkeys(("attention_out_bias", "use_qk_norm"), BOOLEAN),
    **dict.fromkeys(("rope_scaling", "rope_parameters", "id2label", "sentence_transformers"), OBJECT),
}

# of rope_scaling and rope_parameters
ROPE_FIELDS: dict[str, Kind] = {
    **dict.fromkeys(("rope_type", "type"), TEXT),
    "rope_theta": THETA,
    "partial_rotary_factor": Number(1e-3, 1.0),
    "factor": Number(1.0, 1e6),
    **dict.fromkeys(("original_max_position_embeddings", "max_position_embeddings"), POSITIONS),
    **dict.fromkeys(("low_freq_factor", "high_freq_factor", "beta_fast", "beta_slow", "attention_factor"), SCALE),
    **dict.fromkeys(("mscale", "mscale_all_dim"), Number(0.0, 1e6)),
    **dict.fromkeys(("short_factor", "long_factor"), FACTORS),
    "llama_4_scaling_beta": Number(0.0, 1e3),
    "truncate": BOOLEAN,
}
ROPES = ("rope_scaling", "rope_parameters")
# null in these is the default too; elsewhere it may mean that a model goes without, and families decide
NULL_IS_ABSENT = (
    "block_auto_adjust_ff_dim",
    "block_multiple_of",
    "conv_L_cache",
    "full_attention_interval",
    "linear_conv_kernel_dim",
    "linear_key_head_dim",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_value_head_dim",
    "layer_norm_eps",
    "logit_scale",
    "moe_intermediate_size",
    "n_routed_experts",
    "num_attention_heads",
    "num_local_experts",
    "routed_scaling_factor",
    "swiglu_alpha",
    "swiglu_limit",
)


def checked(config: Config) -> dict[str, Any]:
    """The config with whole numbers as integers. Raises BadValue."""
    found = {name: value for name, value in config.items() if value is not None or name not in NULL_IS_ABSENT}
    for name, value in walk(config):
        kind = FIELDS[name]
        single = kind.kind if isinstance(kind, Each) else kind
        if isinstance(single, Int) and isinstance(value, float):
            found[name] = int(value)
    check_together(found)
    return found


def walk(config: Config) -> Iterator[tuple[str, Any]]:
    """Name and value of each listed field that is there. Raises BadValue for the first that cannot be."""
    for name, kind in FIELDS.items():
        if (value := config.get(name)) is not None:
            check_value(name, value, kind)
            yield name, value
    for field in ROPES:
        for name, rope in ropes_of(field, config.get(field) or {}):
            for key, kind in ROPE_FIELDS.items():
                if rope.get(key) is not None:
                    check_value(f"{name}.{key}", rope[key], kind)


def walk_ids(generation: Config) -> None:
    """The same for the ids of a generation_config.json."""
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if generation.get(name) is not None:
            check_value(name, generation[name], FIELDS[name])


def ropes_of(field: str, value: Config) -> Iterator[tuple[str, Config]]:
    """One set of settings, or one for each type of layer."""
    yield field, value
    for key, inner in value.items():
        if isinstance(inner, dict):
            yield f"{field}.{key}", inner


def check_value(name: str, value: Any, kind: Kind) -> None:
    if not kind(value):
        raise BadValue(f"{name} is {short(repr(value))}; it must be {kind}")


def check_groups(config: Config, experts: int | None, chosen: int | None) -> None:
    """Experts in groups, of which some are looked at first."""
    groups, looked_at = config.get("n_group"), config.get("topk_group")
    if not (experts and groups and looked_at):
        return
    if experts % groups:
        raise BadValue(f"n_group is {groups}, which does not divide the {experts} experts there are")
    if looked_at > groups:
        raise BadValue(f"topk_group is {looked_at}, more than n_group, {groups}")
    if chosen and chosen > experts // groups * looked_at:
        raise BadValue(f"num_experts_per_tok is {chosen}; topk_group, {looked_at}, leaves fewer experts than that")


def check_together(config: Config) -> None:
    """What must fit to each other."""
    heads, kv_heads = config.get("num_attention_heads"), config.get("num_key_value_heads")
    if heads and isinstance(kv_heads, int) and heads % kv_heads:
        raise BadValue(f"num_attention_heads is {heads}, which is no multiple of num_key_value_heads, {kv_heads}")
    hidden = config.get("hidden_size")
    if heads and hidden and not config.get("head_dim") and heads > hidden:
        raise BadValue(f"num_attention_heads is {heads}, more than hidden_size, {hidden}")
    experts = config.get("num_experts") or config.get("num_local_experts") or config.get("n_routed_experts")
    chosen = config.get("num_experts_per_tok")
    if experts and chosen and chosen > experts:
        raise BadValue(f"num_experts_per_tok is {chosen}, more than the {experts} experts there are")
    check_groups(config, experts, chosen)
    layers, types = config.get("num_hidden_layers"), config.get("layer_types")
    if layers and types and len(types) < layers:
        raise BadValue(f"layer_types has {len(types)} entries, num_hidden_layers is {layers}")
    for field in ROPES:
        for name, rope in ropes_of(field, config.get(field) or {}):
            low, high = rope.get("low_freq_factor"), rope.get("high_freq_factor")
            if low is not None and high is not None and low >= high:
                raise BadValue(f"{name}.low_freq_factor is {low}; it must be less than high_freq_factor, {high}")
