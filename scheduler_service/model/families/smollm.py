"""SmolLM3: Llama whose every fourth layer knows nothing of positions."""

from quartet.scheduler_service.model.families.llama import Config, common, no_rope
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """SmolLM3ForCausalLM."""
    count, interval = config["num_hidden_layers"], config.get("no_rope_layer_interval") or 4
    turned = config.get("no_rope_layers") or [(layer + 1) % interval != 0 for layer in range(count)]
    window = config.get("sliding_window") if config.get("use_sliding_window") else None
    kinds = config.get("layer_types") or ["full_attention" if rope else "sliding_attention" for rope in turned]
    layers = tuple(
        LayerSpec(window if kind == "sliding_attention" else None, rope=0 if rope else 1)
        for kind, rope in zip(kinds, turned, strict=True)
    )
    fields = common(config, context_length, tied=True)
    bias = bool(config.get("attention_bias"))
    return DecoderSpec(
        **{**fields, "layers": layers, "ropes": (*fields["ropes"], no_rope(fields["head_dim"]))},
        qkv_bias=bias,
        output_bias=bias,
        mlp_bias=bool(config.get("mlp_bias")),
    )
