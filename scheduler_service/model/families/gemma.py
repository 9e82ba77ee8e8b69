"""Gemma 1 to 3 (text): scaled embeddings; in 2 and 3 norms around each block, and sliding windows."""

from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.rope import Parameters, rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

SANDWICH = Names(
    after_attention="post_attention_layernorm",
    before_mlp="pre_feedforward_layernorm",
    after_mlp="post_feedforward_layernorm",
)
LOCAL_THETA = 10_000.0
GLOBAL_THETA = 1_000_000.0


def gemma1(config: Config, context_length: int) -> DecoderSpec:
    """GemmaForCausalLM: released configs call the activation gelu, and mean its approximation."""
    named = config.get("hidden_act")
    config = {**config, "hidden_activation": None if named == "gelu" else named}
    fields = gemma(config, context_length, rope_parameters(config))
    return DecoderSpec(**{**fields, "names": Names(), "attention_scale": fields["head_dim"] ** -0.5})


def gemma2(config: Config, context_length: int) -> DecoderSpec:
    """Gemma2ForCausalLM: every other layer slides; attention and logits are soft-capped."""
    layers = tuple(LayerSpec(window) for window in windows(config, lambda layer: layer % 2 == 0))
    fields = gemma(config, context_length, rope_parameters(config))
    return DecoderSpec(
        **{**fields, "layers": layers},
        attention_softcap=config.get("attn_logit_softcapping", 50.0),
        logit_softcap=config.get("final_logit_softcapping", 30.0),
    )


def gemma3(config: Config, context_length: int) -> DecoderSpec:
    """Gemma3ForCausalLM: five of six layers slide and have a rope of their own; queries and keys are normed."""
    both_ways = bool(config.get("use_bidirectional_attention"))
    if both_ways:  # the config counts both directions
        config = {**config, "sliding_window": config["sliding_window"] // 2 + 1}
    period = config.get("sliding_window_pattern") or config.get("_sliding_window_pattern") or 6
    layers = tuple(
        LayerSpec(window, rope=1 if window else 0)
        for window in windows(config, lambda layer: (layer + 1) % period != 0)
    )
    full = rope_parameters(config, "full_attention", GLOBAL_THETA)
    fields = gemma(config, context_length, full)
    sliding = rope_spec(local_rope(config), fields["head_dim"], context_length)
    return DecoderSpec(
        **{**fields, "layers": layers, "ropes": (*fields["ropes"], sliding)},
        causal=not both_ways,
        query_key_norm=True,
        attention_softcap=config.get("attn_logit_softcapping"),
        logit_softcap=config.get("final_logit_softcapping"),
    )


def local_rope(config: Config) -> Parameters:
    """The sliding layers' rope: in old configs one number, and `rope_scaling` is not for them."""
    if config.get("rope_parameters"):
        return rope_parameters(config, "sliding_attention", LOCAL_THETA)
    theta = config.get("rope_local_base_freq") or LOCAL_THETA
    return {"rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 1.0}


def gemma(config: Config, context_length: int, rope: Parameters) -> dict[str, Any]:
    """The fields that all generations read alike."""
    fields = common({"head_dim": 256, **config}, context_length, rope, tied=True)
    bias = bool(config.get("attention_bias"))
    return {
        **fields,
        "activation": config.get("hidden_activation") or "gelu_pytorch_tanh",
        "attention_scale": config.get("query_pre_attn_scalar", 256) ** -0.5,
        "embedding_scale": config["hidden_size"] ** 0.5,
        "rounds_embedding_scale": True,
        "norm": "rms_plus_one",
        "names": SANDWICH,
        "qkv_bias": bias,
        "output_bias": bias,
    }
