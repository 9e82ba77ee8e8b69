"""Prints the README's table of supported models from what the code knows: `python -m deploy.supported_models`."""

from quartet.runtime.model_files.gguf_config import ARCHITECTURES, MIXTRAL
from quartet.scheduler_service.model import embedders, registry
from quartet.scheduler_service.weights.quantized.methods import METHODS

MODELS = {  # architecture → models that have it
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "Ernie4_5ForCausalLM": "ERNIE 4.5 0.3B",
    "Exaone4ForCausalLM": "EXAONE 4.0 1.2B and 32B",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 270M and 1B",
    "Glm4ForCausalLM": "GLM-4-0414 9B and 32B, GLM-Z1",
    "Glm4MoeForCausalLM": "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    "GptOssForCausalLM": "gpt-oss-20b, gpt-oss-120b",
    "GraniteForCausalLM": "Granite 3.0 to 3.3, Granite 4.0 dense",
    "LlamaForCausalLM": "Llama 2 to 3.3, SmolLM 2, Yi, DeepSeek-R1-Distill-Llama, TinyLlama",
    "MiniMaxM2ForCausalLM": "MiniMax-M2",
    "Ministral3ForCausalLM": "text models of the Ministral 3 family",
    "MinistralForCausalLM": "Ministral 8B",
    "MistralForCausalLM": "Mistral 7B, Mistral Nemo, Mistral Small 3",
    "MixtralForCausalLM": "Mixtral 8x7B, 8x22B",
    "Olmo2ForCausalLM": "OLMo 2 1B to 32B",
    "Olmo3ForCausalLM": "OLMo 3 7B and 32B",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ, DeepSeek-R1-Distill-Qwen, gte-Qwen2",
    "Qwen2MoeForCausalLM": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "Qwen3ForCausalLM": "Qwen3, Qwen3-Embedding",
    "Qwen3MoeForCausalLM": "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    "SeedOssForCausalLM": "Seed-OSS 36B",
    "SmolLM3ForCausalLM": "SmolLM3 3B",
    "Bert": "BERT, MiniLM, BGE, E5, GTE",
    "Camembert": "CamemBERT",
    "DistilBert": "DistilBERT",
    "ModernBert": "ModernBERT, gte-modernbert",
    "Roberta": "RoBERTa",
    "XLMRoberta": "XLM-R, BGE-M3, bge-reranker-v2-m3",
}


def table() -> str:
    """Markdown: each architecture with models that have it, then the formats of weights."""
    in_gguf = {architecture.name for architecture in (*ARCHITECTURES.values(), MIXTRAL)}
    rows = ["| architecture | for example | serves |", "|---|---|---|"]
    for name in sorted(registry.FAMILIES):
        gguf = "; from GGUF too" if name in in_gguf else ""
        rows.append(f"| `{name}` | {MODELS[name]} | text, embeddings, scores{gguf} |")
    for name in sorted(embedders.FAMILIES):
        rows.append(f"| `{name}…` | {MODELS[name]} | embeddings, classes, reranking |")
    methods = ", ".join(f"`{method}`" for method in sorted(METHODS))
    rows.append("| other causal models | those that transformers can run | text, slower |")
    return "\n".join([*rows, "", f"Quantized weights: GGUF, {methods}."])


if __name__ == "__main__":
    print(table())
