"""Phi-3 and Phi-4-mini: Llama with fused matrices in the checkpoint, longrope and partly rotated heads."""

from scheduler_service.model.families.llama import Config, common, windows
from scheduler_service.model.rope import rope_parameters, rope_spec
from scheduler_service.model.spec import DecoderSpec, LayerSpec, Names

LONGROPE_NAMES = ("su", "yarn")  # what early checkpoints call it


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """Phi3ForCausalLM."""
    fields = common(config, context_length)
    parameters = rope_parameters(config)
    if parameters["rope_type"] in LONGROPE_NAMES:
        parameters["rope_type"] = "longrope"
        parameters["original_max_position_embeddings"] = config.get("original_max_position_embeddings", 4096)
    fields["ropes"] = (rope_spec(parameters, fields["head_dim"], context_length),)
    fields["layers"] = tuple(LayerSpec(window) for window in windows(config, lambda layer: True, default=None))
    return DecoderSpec(**fields, names=Names(qkv=("qkv_proj",), gate_up=("gate_up_proj",)))
