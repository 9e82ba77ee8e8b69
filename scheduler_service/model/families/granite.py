"""Granite 3 and 4: Llama with multipliers for embeddings, attention, residuals and logits; state spaces in 4 H."""

from dataclasses import replace

from quartet.scheduler_service.model.families.llama import Config, common, no_rope
from quartet.scheduler_service.model.families.mamba import state_space
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec, Names

HYBRID_NAMES = Names(mlp="shared_mlp", gate_up=("input_linear",), down="output_linear")
ATTENTION = ("attention", "full_attention")  # in configs of all ages


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """GraniteForCausalLM.

    What a block adds is multiplied by m. Ours is the same model with its residual stream divided by m: then nothing is
    to be multiplied but the embeddings, and the norms, which undo any scale, have their epsilon divided by m squared.
    """
    fields = common(config, context_length)
    multiplier = config.get("residual_multiplier") or 1.0
    bias = bool(config.get("attention_bias"))
    changed = {
        "attention_scale": float(config.get("attention_multiplier") or 1.0),
        "norm_epsilon": fields["norm_epsilon"] / multiplier**2,
    }
    return DecoderSpec(
        **{**fields, **changed},
        embedding_scale=(config.get("embedding_multiplier") or 1.0) / multiplier,
        scales_given_embeddings=True,
        logit_scale=1.0 / (config.get("logits_scaling") or 1.0),
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )


def hybrid(config: Config, context_length: int) -> DecoderSpec:
    """GraniteMoeHybridForCausalLM: a shared expert in every layer, others beside it where the config has some."""
    size = config.get("shared_intermediate_size", 1024)
    spec = decoder_spec({**config, "intermediate_size": size, "mlp_bias": False}, context_length)
    moe = None
    if experts := config.get("num_local_experts", 8):
        moe = MoeSpec(
            experts=experts,
            top_k=config.get("num_experts_per_tok", 2),
            intermediate_size=config["intermediate_size"],
            renormalize=True,
            block="block_sparse_moe",
            router="router.layer",
            shared_intermediate_size=size,
            shared_gate=False,
            shared=".shared_mlp",
            shared_gate_up=("input_linear",),
            shared_down="output_linear",
        )
    space = state_space(config)
    kinds = config.get("layer_types") or config.get("layers_block_type") or [""] * config["num_hidden_layers"]
    layers = tuple(LayerSpec(moe=moe, recurrent=None if kind in ATTENTION else space) for kind in kinds)
    ropes = spec.ropes if config.get("position_embedding_type") == "rope" else (no_rope(spec.head_dim),)
    return replace(spec, layers=layers, ropes=ropes, names=HYBRID_NAMES)
