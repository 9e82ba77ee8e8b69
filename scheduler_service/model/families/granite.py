"""Granite 3 and 4 (dense): Llama with multipliers for embeddings, attention, residuals and logits."""

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.spec import DecoderSpec


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
