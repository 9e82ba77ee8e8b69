"""GLM-4 (dense) and GLM-4.5 to 4.7 (mixture of experts): partly rotated heads."""

from dataclasses import replace

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec, Names

HALF = 0.5  # of a head's dimensions are rotated, where the config does not say

GLM4_NAMES = Names(
    gate_up=("gate_up_proj",), after_attention="post_self_attn_layernorm", after_mlp="post_mlp_layernorm"
)


def glm4(config: Config, context_length: int) -> DecoderSpec:
    """Glm4ForCausalLM: norms around each block; neighbours are rotated."""
    rope = rope_parameters({"partial_rotary_factor": HALF, **config})
    fields = common({"head_dim": 128, "rms_norm_eps": 1.5625e-7, **config}, context_length, rope)
    return DecoderSpec(
        **{**fields, "ropes": (replace(fields["ropes"][0], interleaved=True),)},
        names=GLM4_NAMES,
        qkv_bias=config.get("attention_bias", True),
    )


def glm4_moe(config: Config, context_length: int) -> DecoderSpec:
    """Glm4MoeForCausalLM: experts behind the first layers, chosen by sigmoids and a bias."""
    rope = rope_parameters({"partial_rotary_factor": HALF, **config})
    fields = common({"rms_norm_eps": 1e-5, **config}, context_length, rope)
    return DecoderSpec(
        **{**fields, "layers": scored_layers(config)},
        qkv_bias=bool(config.get("attention_bias")),
        query_key_norm=bool(config.get("use_qk_norm")),
        extra_layers=config.get("num_nextn_predict_layers") or 0,
    )


def scored_layers(config: Config, scale: float = 1.0, shared: int = 1) -> tuple[LayerSpec, ...]:
    """Dense layers, then mixtures with a shared expert, as DeepSeek V3 has them.

    `scale` and the number of `shared` experts are for configs that do not say.
    """
    moe = MoeSpec(
        experts=config["n_routed_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        renormalize=config.get("norm_topk_prob", True),
        scoring="sigmoid",
        score_bias="gate.e_score_correction_bias",
        groups=config.get("n_group") or 1,
        top_groups=config.get("topk_group") or 1,
        scale=config.get("routed_scaling_factor", scale),
        shared_intermediate_size=config["moe_intermediate_size"] * config.get("n_shared_experts", shared),
        shared_gate=False,
        shared="shared_experts",
    )
    first = config.get("first_k_dense_replace", 1)
    return tuple(LayerSpec(moe=moe if layer >= first else None) for layer in range(config["num_hidden_layers"]))
