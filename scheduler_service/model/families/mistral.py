"""Mistral: Llama with a sliding window on every layer; and Ministral, its small relatives."""

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, QueryScale

MINISTRAL_ROPE = {
    "rope_type": "yarn",
    "rope_theta": 1_000_000.0,
    "factor": 16.0,
    "original_max_position_embeddings": 16384,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "mscale_all_dim": 1.0,
    "mscale": 1.0,
    "llama_4_scaling_beta": 0.1,
}


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """MistralForCausalLM."""
    layers = tuple(LayerSpec(window) for window in windows(config, lambda layer: True))
    return DecoderSpec(**{**common(config, context_length), "layers": layers})


def ministral(config: Config, context_length: int) -> DecoderSpec:
    """MinistralForCausalLM: sliding and full attention by `layer_types`."""
    layers = tuple(LayerSpec(window) for window in windows(config, lambda layer: True))
    return DecoderSpec(**{**common(config, context_length), "layers": layers})


def ministral3(config: Config, context_length: int) -> DecoderSpec:
    """Ministral3ForCausalLM: queries grow with their position."""
    config = {"head_dim": 128, "rms_norm_eps": 1e-5, "rope_parameters": MINISTRAL_ROPE, **config}
    rope = rope_parameters(config)
    layers = (LayerSpec(config.get("sliding_window")),) * config["num_hidden_layers"]
    scale = QueryScale(rope["llama_4_scaling_beta"], rope["original_max_position_embeddings"])
    return DecoderSpec(**{**common(config, context_length, rope), "layers": layers}, query_scale=scale)
