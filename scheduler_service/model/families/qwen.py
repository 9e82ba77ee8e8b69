"""Qwen 2, 2.5 and 3, dense and mixture of experts."""

from collections.abc import Callable
from typing import Any

from quartet.scheduler_service.model.families.llama import Config, common, sparse_layers, windows
from quartet.scheduler_service.model.spec import DecoderSpec, LayerSpec, MoeSpec


def qwen2(config: Config, context_length: int) -> DecoderSpec:
    """Qwen2ForCausalLM: biases on queries, keys and values."""
    return DecoderSpec(**dense(config, context_length), qkv_bias=True)


def qwen3(config: Config, context_length: int) -> DecoderSpec:
    """Qwen3ForCausalLM: queries and keys are normed per head."""
    return DecoderSpec(**dense({"head_dim": 128, **config}, context_length), **qwen3_attention(config))


def qwen2_moe(config: Config, context_length: int) -> DecoderSpec:
    """Qwen2MoeForCausalLM: qwen2 with experts and a gated shared expert."""
    shared = config["shared_expert_intermediate_size"]
    return DecoderSpec(**sparse(config, context_length, shared), qkv_bias=config.get("qkv_bias", True))


def qwen3_moe(config: Config, context_length: int) -> DecoderSpec:
    """Qwen3MoeForCausalLM: qwen3 with experts."""
    return DecoderSpec(**sparse(config, context_length, shared=0), **qwen3_attention(config))


def qwen3_attention(config: Config) -> dict[str, Any]:
    bias = bool(config.get("attention_bias"))
    return {"query_key_norm": True, "qkv_bias": bias, "output_bias": bias}


def dense(config: Config, context_length: int) -> dict[str, Any]:
    first_sliding = config.get("max_window_layers", 28)
    layers = tuple(LayerSpec(window) for window in qwen_windows(config, lambda layer: layer >= first_sliding))
    return {**common(config, context_length), "layers": layers}


def sparse(config: Config, context_length: int, shared: int) -> dict[str, Any]:
    """Fields of a spec with experts; `shared` is the size of the shared expert, 0 for none."""
    moe = MoeSpec(
        experts=config.get("num_experts") or config["num_local_experts"],
        top_k=config["num_experts_per_tok"],
        intermediate_size=config["moe_intermediate_size"],
        renormalize=bool(config.get("norm_topk_prob", False)),
        shared_intermediate_size=shared,
    )
    return {**common(config, context_length), "layers": sparse_layers(config, moe, moe_windows(config, bool(shared)))}


def moe_windows(config: Config, alternate: bool) -> list[int | None]:
    """qwen2_moe slides every other layer below `max_window_layers`, qwen3_moe all of them, when asked to."""
    below = config.get("max_window_layers", 28)
    return qwen_windows(config, lambda layer: not alternate or (layer % 2 == 0 and layer < below))


def qwen_windows(config: Config, is_sliding: Callable[[int], bool]) -> list[int | None]:
    """Qwen names a window in every config and switches it on with `use_sliding_window`."""
    if not config.get("use_sliding_window"):
        return [None] * config["num_hidden_layers"]
    return windows(config, is_sliding)
