"""MiniMax-M2: experts chosen by sigmoids and a bias; queries and keys are normed over all heads together."""

from quartet.scheduler_service.model.families.llama import Config, common, head_dim
from quartet.scheduler_service.model.rope import rope_parameters
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec

THETA = 5_000_000.0


def m2(config: Config, context_length: int) -> DecoderSpec:
    """MiniMaxM2ForCausalLM."""
    config = {"head_dim": 128, **config}
    if config.get("rotary_dim"):  # how released checkpoints say which part of a head is rotated
        config = {"partial_rotary_factor": config["rotary_dim"] / head_dim(config), **config}
    moe = MoeSpec(
        experts=config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["intermediate_size"],
        renormalize=True,
        scoring="sigmoid",
        score_bias="e_score_correction_bias",
        block="block_sparse_moe",
        gate_up=("w1", "w3"),
        down="w2",
    )
    fields = common(config, context_length, rope_parameters(config, theta=THETA))
    return DecoderSpec(
        **{**fields, "layers": (LayerSpec(moe=moe),) * config["num_hidden_layers"]},
        query_key_norm=True,
        query_key_norm_over="heads",
    )
