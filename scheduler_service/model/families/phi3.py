"""Phi-3 and Phi-4-mini: Llama with fused matrices in the checkpoint, longrope and partly rotated heads."""

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

LONGROPE_NAMES = ("su", "yarn")  # what early checkpoints call it
TRAINED_LENGTH = 4096  # where the config does not say


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """Phi3ForCausalLM."""
    rope = rope_parameters(config)
    if rope["rope_type"] in LONGROPE_NAMES:
        trained = config.get("original_max_position_embeddings") or TRAINED_LENGTH
        rope |= {"rope_type": "longrope", "original_max_position_embeddings": trained}
    layers = tuple(LayerSpec(window) for window in windows(config, lambda layer: True, default=None))
    fields = {**common(config, context_length, rope), "layers": layers}
    return DecoderSpec(**fields, names=Names(qkv=("qkv_proj",), gate_up=("gate_up_proj",)))
