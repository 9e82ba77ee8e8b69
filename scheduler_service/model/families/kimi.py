"""Kimi-Linear: linear attention that forgets by channel, with latent attention in some layers; neither is rotated."""

from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.families.deepseek import v3
from quartet.scheduler_service.model.families.llama import Config, no_rope
from quartet.scheduler_service.model.gated_delta import DeltaNames, GatedDeltaSpec
from quartet.scheduler_service.model.spec import DecoderSpec, require

NAMES = DeltaNames(
    inner=("q_proj", "k_proj", "v_proj"),
    rates=("b_proj", "f_a_proj", "g_a_proj"),
    narrow=("f_b_proj", "g_b_proj"),
    convolution=("q_conv1d", "k_conv1d", "v_conv1d"),
    norm="o_norm",
    output="o_proj",
)
AS_DEEPSEEK = {  # its names for the same fields
    "n_routed_experts": "num_experts",
    "num_experts_per_tok": "num_experts_per_token",
    "norm_topk_prob": "moe_renormalize",
    "n_shared_experts": "num_shared_experts",
    "n_group": "num_expert_group",
}
EXPERTS: dict[str, Any] = {"block": "block_sparse_moe", "gate_up": ("w1", "w3"), "down": "w2"}


def linear(config: Config, context_length: int) -> DecoderSpec:
    """KimiLinearForCausalLM."""
    require(config, {"moe_router_activation_func": "sigmoid", "mla_use_nope": True, "moe_layer_freq": 1})
    config = {"rms_norm_eps": 1e-5, "routed_scaling_factor": 2.446, "num_shared_experts": 1, **config}
    config |= {theirs: config[own] for theirs, own in AS_DEEPSEEK.items() if own in config}
    own = {"first_k_dense_replace": 1, **config}
    if kinds := config.get("mlp_layer_types"):
        own["first_k_dense_replace"] = kinds.count("dense")
        require({"mlp_layer_types": sorted(kinds)}, {"mlp_layer_types": kinds})
    spec = v3(own, context_length)
    delta = delta_spec(config)
    layers = (replace(layer, moe=layer.moe and replace(layer.moe, **EXPERTS)) for layer in spec.layers)
    linear = linear_layers(config)
    return replace(
        spec,
        layers=tuple(replace(layer, recurrent=delta if i in linear else None) for i, layer in enumerate(layers)),
        ropes=(no_rope(config["qk_rope_head_dim"]),),
    )


def delta_spec(config: Config) -> GatedDeltaSpec:
    """Linear attention: released configs have its fields in a part of their own."""
    own = config.get("linear_attn_config") or {}
    heads = own.get("num_heads") or config.get("linear_num_heads", 32)
    dim = own.get("head_dim") or config.get("linear_head_dim", 128)
    return GatedDeltaSpec(
        taps=own.get("short_conv_kernel_size") or config.get("linear_conv_kernel_dim", 4),
        key_heads=heads,
        value_heads=heads,
        key_dim=dim,
        value_dim=dim,
        epsilon=config["rms_norm_eps"],
        gate="sigmoid",
        block="self_attn",
        names=NAMES,
    )


def linear_layers(config: Config) -> set[int]:
    """The layers with linear attention; released configs count from one."""
    if kinds := config.get("layer_types"):
        return {i for i, kind in enumerate(kinds) if kind == "linear_attention"}
    if layers := (config.get("linear_attn_config") or {}).get("kda_layers"):
        return {layer - 1 for layer in layers}
    return {i for i in range(config["num_hidden_layers"]) if i % 4 or not i}
