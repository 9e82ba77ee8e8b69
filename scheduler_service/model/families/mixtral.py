"""Mixtral: Mistral with a mixture of experts in every layer."""

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """MixtralForCausalLM."""
    moe = MoeSpec(
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        renormalize=True,
        block="block_sparse_moe",
        gate_up=("w1", "w3"),
        down="w2",
    )
    layers = tuple(LayerSpec(window, moe=moe) for window in windows(config, lambda layer: True, default=None))
    return DecoderSpec(**{**common(config, context_length, theta=1_000_000.0), "layers": layers})
