"""The language models inside models that also read images or sound: which they are, and what their configs omit."""

from collections.abc import Mapping
from typing import Any

Config = Mapping[str, Any]

# architecture → that of its language model by the `model_type` of its text_config; "": of any other, or without one
TOWERS: dict[str, dict[str, str]] = {
    "Gemma3ForConditionalGeneration": {"": "Gemma3ForCausalLM"},
    "Gemma3nForConditionalGeneration": {"": "Gemma3nForCausalLM"},
    "Gemma4ForConditionalGeneration": {"": "Gemma4ForCausalLM"},
    "Gemma4UnifiedForConditionalGeneration": {"": "Gemma4UnifiedForCausalLM"},
    "Llama4ForConditionalGeneration": {"": "Llama4ForCausalLM"},
    "Mistral3ForConditionalGeneration": {"mistral": "MistralForCausalLM", "ministral3": "Ministral3ForCausalLM"},
    "Qwen2VLForConditionalGeneration": {"": "Qwen2ForCausalLM"},
    "Qwen2_5_VLForConditionalGeneration": {"": "Qwen2ForCausalLM"},
    "Qwen3VLForConditionalGeneration": {"": "Qwen3ForCausalLM"},
    "Qwen3VLMoeForConditionalGeneration": {"": "Qwen3MoeForCausalLM"},
    "Qwen3_5ForConditionalGeneration": {"": "Qwen3_5ForCausalLM"},
    "Qwen3_5MoeForConditionalGeneration": {"": "Qwen3_5MoeForCausalLM"},
}
GEMMA3 = {
    "vocab_size": 262208,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
GEMMA3N = {
    "vocab_size": 262400,
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_hidden_layers": 35,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 256,
    "max_position_embeddings": 32768,
    "tie_word_embeddings": True,
}
GEMMA4 = {
    "vocab_size": 262144,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 30,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}
OMITTED: dict[str, dict[str, Any]] = {  # what released configs leave to transformers' defaults
    "gemma3_text": GEMMA3,
    "gemma3n_text": GEMMA3N,
    "gemma4_text": GEMMA4,
    "gemma4_unified_text": {**GEMMA4, "max_position_embeddings": 262144},
    "qwen3_vl_moe_text": {"norm_topk_prob": True},
}


def text_config(config: Config) -> dict[str, Any]:
    """The text part of a config.json, with what is omitted there; the whole for a model of text alone."""
    inner = config.get("text_config")
    if not isinstance(inner, dict):
        return dict(config)
    return {**config, **OMITTED.get(str(inner.get("model_type")), {}), **inner}


def language_model(architecture: str, config: Config) -> str:
    """The architecture that computes text: itself but for the models of the table.

    `config` is the text part. Of a model type that is not listed: the architecture itself, which nobody serves.
    """
    kinds = TOWERS.get(architecture)
    if kinds is None:
        return architecture
    return kinds.get(str(config.get("model_type")), kinds.get("", architecture))
