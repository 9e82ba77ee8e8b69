"""Gemma 4 (text): heads that differ by layer, shared keys and values, an input for each layer, experts."""

from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.families.gemma import GLOBAL_THETA, LOCAL_THETA, gemma
from quartet.scheduler_service.model.families.gemma_layers import (
    FULL,
    SLIDING,
    head_dim_of,
    layer_types,
    other,
    readers,
    sizes_of,
)
from quartet.scheduler_service.model.families.llama import Config, windows
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerInputSpec, LayerSpec, MoeSpec, NotNative

ROPES = {
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": GLOBAL_THETA},
    SLIDING: {"rope_type": "default", "rope_theta": LOCAL_THETA},
}


def gemma4(config: Config, context_length: int) -> DecoderSpec:
    """Gemma4ForCausalLM."""
    if config.get("use_bidirectional_attention") == "all":
        raise NotNative("use_bidirectional_attention='all'")
    types = [*layer_types(config, 6)[:-1], FULL]  # the last layer is a full one, whatever the config says
    config = {"sliding_window": 512, **config, "layer_types": types}
    config["rope_parameters"] = config.get("rope_parameters") or ROPES
    fields = gemma(config, context_length, {**ROPES[SLIDING], "partial_rotary_factor": 1.0})
    layers = layers_of(config, fields)
    dims = {kind: head_dim_of(types, layers, kind, fields["head_dim"]) for kind in (FULL, SLIDING)}
    ropes = tuple(rope_spec(rope_parameters(config, kind), dims[kind], context_length) for kind in dims)
    if config.get("enable_moe_block"):
        fields["names"] = replace(fields["names"], before_mlp="pre_feedforward_layernorm_2")
    size, vocabulary = config.get("hidden_size_per_layer_input", 256), config.get("vocab_size_per_layer_input")
    return DecoderSpec(
        **{**fields, "layers": layers, "ropes": ropes, "attention_scale": 1.0, "norm": "rms"},
        query_key_norm=True,
        value_norm=True,
        layer_scales=True,
        layer_inputs=LayerInputSpec(size, vocabulary or 262_144) if size else None,
        logit_softcap=config.get("final_logit_softcapping"),
    )


def unified(config: Config, context_length: int) -> DecoderSpec:
    """Gemma4UnifiedForCausalLM: no inputs for layers, and no experts."""
    without = {"hidden_size_per_layer_input": 0, "enable_moe_block": False}
    return gemma4({"sliding_window": 1024, **config, **without}, context_length)


def layers_of(config: Config, fields: dict[str, Any]) -> tuple[LayerSpec, ...]:
    """All layers: their sizes, whose keys and values they read, and their blocks."""
    types, moe, size = config["layer_types"], mixture(config), fields["intermediate_size"]
    wide, joint = bool(config.get("use_double_wide_mlp")), bool(config.get("attention_k_eq_v"))
    if moe and wide:
        raise NotNative("use_double_wide_mlp with experts")
    sizes = [sizes_of(config, layer) for layer in range(len(types))]
    shared = readers(types, config.get("num_kv_shared_layers") or 0)
    return tuple(
        LayerSpec(
            window=window,
            rope=1 if kind == SLIDING else 0,
            head_dim=other(own["head_dim"], fields["head_dim"]),
            kv_heads=other(own["num_key_value_heads"], fields["kv_heads"]),
            intermediate_size=2 * size if wide and reads is not None else None,
            reads=reads,
            values_from_keys=joint and kind == FULL and reads is None,
            moe=moe,
        )
        for window, kind, own, reads in zip(windows(config, lambda _: False), types, sizes, shared, strict=True)
    )


def mixture(config: Config) -> MoeSpec | None:
    """Experts beside the dense block, each with norms of its own."""
    if not config.get("enable_moe_block"):
        return None
    return MoeSpec(
        experts=config["num_experts"],
        top_k=config["top_k_experts"],
        intermediate_size=config["moe_intermediate_size"],
        renormalize=True,
        router_norm="router.scale",
        router_scale=config["hidden_size"] ** -0.5,
        expert_scale="router.per_expert_scale",
        shared_intermediate_size=config["intermediate_size"],
        shared_gate=False,
        block="",
        router="router.proj",
        shared=".mlp",
        after="post_feedforward_layernorm_2",
        shared_before="pre_feedforward_layernorm",
        shared_after="post_feedforward_layernorm_1",
    )
