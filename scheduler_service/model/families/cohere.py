"""Cohere 2 (Command R7B, Command A): both blocks read one layer norm; full attention knows no positions."""

from dataclasses import replace

from quartet.scheduler_service.model.families.llama import Config, common, no_rope, windows
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names


def cohere2(config: Config, context_length: int) -> DecoderSpec:
    """Cohere2ForCausalLM."""
    period = config.get("sliding_window_pattern") or 4
    slides = windows(config, lambda layer: (layer + 1) % period != 0)
    fields = common({**config, "head_dim": None}, context_length, tied=True)
    rope = replace(fields["ropes"][0], interleaved=True)
    fields |= {
        "layers": tuple(LayerSpec(window, rope=1 if window is None else 0) for window in slides),
        "ropes": (rope, no_rope(fields["head_dim"])),
        "norm_epsilon": config.get("layer_norm_eps", 1e-5),
    }
    bias = bool(config.get("attention_bias"))
    return DecoderSpec(
        **fields,
        norm="layer",
        parallel=True,
        names=Names(before_mlp=None),
        logit_scale=config.get("logit_scale", 0.0625),
        qkv_bias=bias,
        output_bias=bias,
    )
