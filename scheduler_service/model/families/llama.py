"""Llama 3.x, and the reading of config.json that its relatives share."""

from collections.abc import Callable
from typing import Any

from quartet.scheduler_service.model.rope import Parameters, rope_parameters, rope_spec
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec, NotNative, RopeSpec

Config = dict[str, Any]
Family = Callable[[Config, int], DecoderSpec]


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """LlamaForCausalLM."""
    bias = bool(config.get("attention_bias"))
    mlp_bias = bool(config.get("mlp_bias"))
    return DecoderSpec(**common(config, context_length), qkv_bias=bias, output_bias=bias, mlp_bias=mlp_bias)


def common(
    config: Config, context_length: int, rope: Parameters | None = None, theta: float = 10000.0, tied: bool = False
) -> dict[str, Any]:
    """The fields that every family reads alike; `theta` and `tied` are the family's defaults."""
    dim = head_dim(config)
    rope = rope or rope_parameters(config, theta=theta)
    return {
        "vocab_size": config["vocab_size"],
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "layers": (LayerSpec(),) * config["num_hidden_layers"],
        "heads": config["num_attention_heads"],
        "kv_heads": config.get("num_key_value_heads") or config["num_attention_heads"],
        "head_dim": dim,
        "attention_scale": dim**-0.5,
        "ropes": (rope_spec(rope, dim, context_length),),
        "norm_epsilon": config.get("rms_norm_eps", 1e-6),
        "activation": config.get("hidden_act") or "silu",
        "tied": config.get("tie_word_embeddings", tied),
    }


def head_dim(config: Config) -> int:
    return int(config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"])


def no_rope(dim: int) -> RopeSpec:
    """The rope of layers that know nothing of positions: it turns by nothing, exactly."""
    return RopeSpec((0.0,) * (dim // 2))


def windows(config: Config, is_sliding: Callable[[int], bool], default: int | None = 4096) -> list[int | None]:
    """Each layer's sliding window: by `layer_types` where the config has them, else by the family's rule."""
    count, window = config["num_hidden_layers"], config.get("sliding_window", default)
    types = config.get("layer_types")
    if unknown := sorted(set(types or ()) - {"full_attention", "sliding_attention"}):
        raise NotNative(f"layer_types with {unknown[0]}")
    sliding = [kind == "sliding_attention" for kind in types] if types else [is_sliding(i) for i in range(count)]
    return [window if window and slides else None for slides in sliding]


def sparse_layers(config: Config, moe: MoeSpec, windows: list[int | None]) -> tuple[LayerSpec, ...]:
    """Every `decoder_sparse_step`th layer is a mixture of experts, but for those named in `mlp_only_layers`."""
    step, dense = config.get("decoder_sparse_step", 1), config.get("mlp_only_layers") or []
    return tuple(
        LayerSpec(window=window, moe=moe if layer not in dense and (layer + 1) % step == 0 else None)
        for layer, window in enumerate(windows)
    )
