"""gpt-oss: attention sinks, biases everywhere, experts with a clamped gate; every other layer slides."""

from quartet.scheduler_service.model.families.llama import Config, common, windows
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec, require

THETA = 150_000.0
YARN = {"rope_type": "yarn", "factor": 32.0, "truncate": False, "original_max_position_embeddings": 4096}


def decoder_spec(config: Config, context_length: int) -> DecoderSpec:
    """GptOssForCausalLM. Checkpoints keep the experts of a layer together: weights/quantized/mxfp4.py parts them."""
    require(config, {"swiglu_alpha": 1.702, "swiglu_limit": 7.0})  # numbers of the activation
    if not (config.get("rope_parameters") or config.get("rope_scaling")):
        config = {**config, "rope_scaling": YARN}
    moe = MoeSpec(
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        renormalize=True,
        router="router",
        router_bias=True,
        expert_bias=True,
    )
    slides = windows(config, lambda layer: layer % 2 == 0, default=128)
    fields = common(
        {"head_dim": 64, "rms_norm_eps": 1e-5, **config}, context_length, rope_parameters(config, theta=THETA)
    )
    layers = tuple(LayerSpec(window, moe=moe) for window in slides)
    bias = config.get("attention_bias", True)
    return DecoderSpec(
        **{**fields, "layers": layers, "activation": "clamped_swiglu"},
        sinks=True,
        qkv_bias=bias,
        output_bias=bias,
    )
