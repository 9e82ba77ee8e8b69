"""DeepSeek V2 and V3 (R1, V3.1, Kimi K2), GLM-4.7-Flash: latent attention, experts chosen in groups."""

import math
from dataclasses import replace
from typing import Any

from quartet.scheduler_service.model.families.glm import scored_layers
from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.rope import Parameters, rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LatentSpec


def v2(config: Config, context_length: int) -> DecoderSpec:
    """DeepseekV2ForCausalLM: experts are scored by a softmax, groups by their best expert."""
    config = {"n_group": 1, "topk_group": 1, "rope_interleave": True, "first_k_dense_replace": 0, **config}
    if config.get("topk_method", "greedy") == "greedy":
        config = {**config, "n_group": 1}
    by_softmax: dict[str, Any] = {"scoring": "softmax", "score_bias": None, "group_best": 1, "renormalize": False}
    layers = tuple(
        replace(layer, moe=replace(layer.moe, **by_softmax)) if layer.moe else layer
        for layer in scored_layers(config, shared=2)
    )
    return replace(v3(config, context_length), layers=layers, mlp_bias=bool(config.get("mlp_bias")))


def v3(config: Config, context_length: int) -> DecoderSpec:
    """DeepseekV3ForCausalLM, Glm4MoeLiteForCausalLM."""
    latent = LatentSpec(
        rank=config["kv_lora_rank"],
        query_rank=config.get("q_lora_rank"),
        plain_dim=config["qk_nope_head_dim"],
        rotated_dim=config["qk_rope_head_dim"],
        value_dim=config["v_head_dim"],
    )
    rope = rope_parameters(config)
    turned = rope_spec(rope, latent.rotated_dim, context_length)
    bias = bool(config.get("attention_bias"))
    fields = common({**config, "head_dim": latent.rank + latent.rotated_dim}, context_length, {**rope, **NO_STRETCH})
    fields |= {
        "kv_heads": 1,
        "layers": scored_layers(config, scale=2.5),
        "ropes": (replace(turned, interleaved=config.get("rope_interleave", True)),),
        "attention_scale": (latent.plain_dim + latent.rotated_dim) ** -0.5 * sharpness(rope),
    }
    return DecoderSpec(
        **fields,
        latent=latent,
        qkv_bias=bias,
        output_bias=bias,
        extra_layers=config.get("num_nextn_predict_layers") or 0,
    )


NO_STRETCH = {"rope_type": "default"}  # for what is replaced


def sharpness(rope: Parameters) -> float:
    """What scores are multiplied with where a rope is stretched."""
    weight = rope.get("mscale_all_dim") or 0
    if rope["rope_type"] == "default" or not weight:
        return 1.0
    factor = rope["factor"]
    return (0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0) ** 2
