"""Seed-OSS: Llama with biases on queries, keys and values."""

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.spec import DecoderSpec


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """SeedOssForCausalLM."""
    return DecoderSpec(
        **common({"head_dim": 128, **config}, context_length),
        qkv_bias=config.get("attention_bias", True),
        output_bias=bool(config.get("attention_out_bias")),
        mlp_bias=bool(config.get("mlp_bias")),
    )
