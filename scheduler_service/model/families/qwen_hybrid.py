"""Qwen3-Next and Qwen3.5 (text): three of four layers are linear attention by the gated delta rule."""

from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.families.qwen import sparse
from quartet.scheduler_service.model.gated_delta import DeltaNames, GatedDeltaSpec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec

BY_KEY_HEAD = DeltaNames(inner=("in_proj_qkvz",), rates=("in_proj_ba",))
DEFAULTS: Config = {"head_dim": 256, "partial_rotary_factor": 0.25}


def qwen3_next(config: Config, context_length: int) -> DecoderSpec:
    """Qwen3NextForCausalLM: experts in every layer, with a gated shared one."""
    config = {**DEFAULTS, "norm_topk_prob": True, **config}
    return hybrid(config, sparse(config, context_length, config["shared_expert_intermediate_size"]), by_key_head=True)


def qwen3_5(config: Config, context_length: int) -> DecoderSpec:
    """Qwen3_5ForCausalLM: dense."""
    config = {**DEFAULTS, **config}
    return hybrid(config, common(config, context_length), by_key_head=False)


def qwen3_5_moe(config: Config, context_length: int) -> DecoderSpec:
    """Qwen3_5MoeForCausalLM: experts in every layer, with a gated shared one."""
    config = {**DEFAULTS, "norm_topk_prob": True, "intermediate_size": config["moe_intermediate_size"], **config}
    return hybrid(config, sparse(config, context_length, config["shared_expert_intermediate_size"]), by_key_head=False)


def hybrid(config: Config, fields: dict[str, Any], by_key_head: bool) -> DecoderSpec:
    """The spec of fields whose layers all attend, with those in between that do not."""
    delta = GatedDeltaSpec(
        taps=config.get("linear_conv_kernel_dim", 4),
        key_heads=config.get("linear_num_key_heads", 16),
        value_heads=config.get("linear_num_value_heads", 32),
        key_dim=config.get("linear_key_head_dim", 128),
        value_dim=config.get("linear_value_head_dim", 128),
        epsilon=fields["norm_epsilon"],
        by_key_head=by_key_head,
        names=BY_KEY_HEAD if by_key_head else DeltaNames(),
    )
    period = config.get("full_attention_interval", 4)
    count = config["num_hidden_layers"]
    types = config.get("layer_types") or ["" if (i + 1) % period else "full_attention" for i in range(count)]
    pairs: list[tuple[LayerSpec, str]] = list(zip(fields["layers"], types, strict=True))
    layers = tuple(replace(layer, recurrent=None if kind == "full_attention" else delta) for layer, kind in pairs)
    bias = bool(config.get("attention_bias"))
    return DecoderSpec(
        **{**fields, "layers": layers},
        norm="rms_plus_one",
        query_key_norm=True,
        output_gate=True,
        qkv_bias=bias,
        output_bias=bias,
    )
