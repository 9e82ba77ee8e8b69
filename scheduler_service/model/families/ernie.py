"""ERNIE 4.5 (dense): Llama whose rope turns neighbours."""

from dataclasses import replace

from quartet.scheduler_service.model.families.llama import Config, common
from quartet.scheduler_service.model.spec import DecoderSpec


def ernie4_5(config: Config, context_length: int) -> DecoderSpec:
    """Ernie4_5ForCausalLM."""
    fields = common({"head_dim": 128, "rms_norm_eps": 1e-5, **config}, context_length, tied=True, theta=500_000.0)
    bias = bool(config.get("use_bias"))
    return DecoderSpec(
        **{**fields, "ropes": (replace(fields["ropes"][0], interleaved=True),)},
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bias,
    )
