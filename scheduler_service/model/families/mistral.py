"""Mistral: Llama with a sliding window on every layer."""

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """MistralForCausalLM."""
    layers = tuple(LayerSpec(window) for window in windows(config, lambda layer: True))
    return DecoderSpec(**{**common(config, context_length), "layers": layers})
