"""OLMo 2 and 3: norms behind each block, none in front; queries and keys are normed over all heads together."""

from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.rope import rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

BEHIND = Names(
    before_attention=None,
    after_attention="post_attention_layernorm",
    before_mlp=None,
    after_mlp="post_feedforward_layernorm",
)
THETA = 500_000.0


def olmo2(config: Config, context_length: int) -> DecoderSpec:
    """Olmo2ForCausalLM."""
    return DecoderSpec(**behind(common({"rms_norm_eps": 1e-5, **config}, context_length), config))


def olmo3(config: Config, context_length: int) -> DecoderSpec:
    """Olmo3ForCausalLM: three of four layers slide, with a rope that is never stretched."""
    full = rope_parameters(config, "full_attention", THETA)
    fields = common({"rms_norm_eps": 1e-5, **config}, context_length, full)
    local = config
    if not config.get("rope_parameters"):  # the old form: rope_scaling is for full attention
        local = {**config, "rope_scaling": None}
    sliding = rope_spec(rope_parameters(local, "sliding_attention", THETA), fields["head_dim"], context_length)
    layers = tuple(
        LayerSpec(window, rope=0 if window is None else 1)
        for window in windows(config, lambda layer: (layer + 1) % 4 != 0)
    )
    return DecoderSpec(**behind({**fields, "ropes": (*fields["ropes"], sliding), "layers": layers}, config))


def behind(fields: dict[str, Any], config: Config) -> dict[str, Any]:
    """The fields that both generations add."""
    bias = bool(config.get("attention_bias"))
    return {
        **fields,
        "names": BEHIND,
        "query_key_norm": True,
        "query_key_norm_over": "heads",
        "qkv_bias": bias,
        "output_bias": bias,
    }
