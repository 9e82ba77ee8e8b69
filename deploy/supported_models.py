"""Prints what models there are, from what the code knows: `python -m deploy.supported_models`.

Without an argument the README's table; with `--write` docs/models.md is written, which has every architecture that the
installed transformers knows. What becomes of those without a native family was found by
`python -m tests.model.try_architectures`, and is in tried_models.json.
"""

import argparse
import json
from pathlib import Path

from quartet.runtime.model_files.gguf_metadata import ARCHITECTURES, MIXTRAL
from quartet.runtime.model_files.towers import TOWERS
from quartet.scheduler_service.model import embedders, registry
from quartet.scheduler_service.weights.quantized.methods import METHODS

MODELS = {  # architecture → models that have it
    "BambaForCausalLM": "Bamba 9B",
    "Cohere2ForCausalLM": "Command R7B, Command A",
    "DeepseekV2ForCausalLM": "DeepSeek-V2, V2.5, V2-Lite, Coder-V2",
    "DeepseekV3ForCausalLM": "DeepSeek-V3, V3.1, R1, Kimi K2",
    "Ernie4_5ForCausalLM": "ERNIE 4.5 0.3B",
    "Exaone4ForCausalLM": "EXAONE 4.0 1.2B and 32B",
    "FalconH1ForCausalLM": "Falcon-H1 0.5B to 34B",
    "GemmaForCausalLM": "Gemma 2B and 7B, bge-reranker-v2-gemma",
    "Gemma2ForCausalLM": "Gemma 2",
    "Gemma3ForCausalLM": "Gemma 3 270M and 1B",
    "Gemma3nForCausalLM": "text models of the Gemma 3n family",
    "Gemma4ForCausalLM": "text models of the Gemma 4 family",
    "Gemma4UnifiedForCausalLM": "text models of the unified Gemma 4 family",
    "Glm4ForCausalLM": "GLM-4-0414 9B and 32B, GLM-Z1",
    "Glm4MoeForCausalLM": "GLM-4.5, GLM-4.5-Air, GLM-4.6, GLM-4.7",
    "Glm4MoeLiteForCausalLM": "GLM-4.7-Flash",
    "GptOssForCausalLM": "gpt-oss-20b, gpt-oss-120b",
    "GraniteForCausalLM": "Granite 3.0 to 3.3, Granite 4.0 dense",
    "GraniteMoeHybridForCausalLM": "Granite 4.0 H, Granite 4.0 350M to Micro",
    "KimiLinearForCausalLM": "Kimi-Linear-48B-A3B",
    "Lfm2ForCausalLM": "LFM2 350M to 2.6B",
    "Llama4ForCausalLM": "text models of the Llama 4 family",
    "LlamaForCausalLM": "Llama 2 to 3.3, SmolLM 2, Yi, DeepSeek-R1-Distill-Llama, TinyLlama",
    "MiniMaxM2ForCausalLM": "MiniMax-M2",
    "Ministral3ForCausalLM": "text models of the Ministral 3 family",
    "MinistralForCausalLM": "Ministral 8B",
    "MistralForCausalLM": "Mistral 7B, Mistral Nemo, Mistral Small 3",
    "MixtralForCausalLM": "Mixtral 8x7B, 8x22B",
    "NemotronHForCausalLM": "Nemotron-H, Nemotron Nano 2, Nemotron 3 Nano",
    "Olmo2ForCausalLM": "OLMo 2 1B to 32B",
    "Olmo3ForCausalLM": "OLMo 3 7B and 32B",
    "OlmoHybridForCausalLM": "OLMo Hybrid 7B",
    "Phi3ForCausalLM": "Phi-3, Phi-3.5, Phi-4, Phi-4-mini",
    "Qwen2ForCausalLM": "Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ, DeepSeek-R1-Distill-Qwen, gte-Qwen2",
    "Qwen2MoeForCausalLM": "Qwen1.5-MoE, Qwen2-57B-A14B",
    "Qwen3ForCausalLM": "Qwen3, Qwen3-Embedding",
    "Qwen3MoeForCausalLM": "Qwen3-30B-A3B, Qwen3-235B-A22B, Qwen3-Coder",
    "Qwen3NextForCausalLM": "Qwen3-Next-80B-A3B",
    "Qwen3_5ForCausalLM": "text models of the dense Qwen3.5 family",
    "Qwen3_5MoeForCausalLM": "text models of the Qwen3.5 family with experts",
    "SeedOssForCausalLM": "Seed-OSS 36B",
    "SmolLM3ForCausalLM": "SmolLM3 3B",
    "Bert": "BERT, MiniLM, BGE, E5, GTE, arctic-embed",
    "Camembert": "CamemBERT",
    "Deberta": "DeBERTa v1",
    "DebertaV2": "DeBERTa v3, mxbai-rerank v1, NLI classifiers",
    "DistilBert": "DistilBERT",
    "Electra": "ELECTRA, ms-marco-electra",
    "EuroBert": "EuroBERT 210M to 2.1B",
    "Gte": "gte v1.5, gte-multilingual, arctic-embed-m-v2.0",
    "HF_ColBERT": "ColBERTv2, answerai-colbert-small",
    "JinaEmbeddingsV3": "jina-embeddings-v3 and its -hf copy, with the adapters of their tasks",
    "MPNet": "all-mpnet-base-v2, multi-qa-mpnet",
    "ModernBert": "ModernBERT, gte-modernbert",
    "NomicBert": "nomic-embed-text v1, v1.5 and v2-moe",
    "Roberta": "RoBERTa",
    "XLMRoberta": "XLM-R, BGE-M3, bge-reranker-v2-m3, arctic-embed-l-v2.0",
}
TOWER_MODELS = {
    "Gemma3ForConditionalGeneration": "Gemma 3 4B, 12B and 27B",
    "Gemma3nForConditionalGeneration": "Gemma 3n E2B and E4B",
    "Gemma4ForConditionalGeneration": "Gemma 4 E2B, E4B, 26B-A4B and 31B",
    "Gemma4UnifiedForConditionalGeneration": "Gemma 4 12B",
    "Llama4ForConditionalGeneration": "Llama 4 Scout and Maverick",
    "Mistral3ForConditionalGeneration": "Mistral Small 3.1 and 3.2, Ministral 3",
    "Qwen2VLForConditionalGeneration": "Qwen2-VL",
    "Qwen2_5_VLForConditionalGeneration": "Qwen2.5-VL",
    "Qwen3VLForConditionalGeneration": "Qwen3-VL, dense",
    "Qwen3VLMoeForConditionalGeneration": "Qwen3-VL-30B-A3B, 235B-A22B",
    "Qwen3_5ForConditionalGeneration": "Qwen3.5 0.8B to 27B",
    "Qwen3_5MoeForConditionalGeneration": "Qwen3.5-35B-A3B, 122B-A10B, 397B-A17B",
}
# those that `can_fuse` refuses: a test compares
PLAIN_ON_GPU = {
    "BambaForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "FalconH1ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4UnifiedForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "Llama4ForCausalLM",
    "NemotronHForCausalLM",
    "OlmoHybridForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
}
PAGE = Path(__file__).parents[1] / "docs" / "models.md"
TRIED = Path(__file__).parent / "tried_models.json"
BEGINNING = """# Models

`python -m deploy.supported_models --write` makes this page. It has every architecture that transformers {version},
which Quartet is tested with, knows as a causal language model, and the embedders of our own. `architectures` in a
model's config.json says which one it has.

* **Native**: computed by Quartet's own decoder. All of them have continuous batching, the prefix cache, drafts,
  constrained output, weight updates while they serve, and `--enable-deterministic-inference` on a CPU (but for the
  latent attention of DeepSeek, GLM-4.7-Flash and Kimi-Linear); on a CPU weights may be quantized (`--quantization int8`
  or `int4`). Models with recurrent layers (LFM2, Qwen3-Next, Qwen3.5, OLMo Hybrid, Kimi-Linear, and those with Mamba-2:
  Bamba, Falcon-H1, Granite 4 H, Nemotron-H) go without drafts and LoRA adapters. In Gemma 3n and 4 an embedding that a
  request brings has no row in the second table.
* **Through transformers**: transformers' own code with Quartet's attention. Slower, and compared with its own logits at
  each start. Weights are not kept quantized, and there is no deterministic inference.
* **Refused**: the start ends with the reason.

Weights are read from safetensors, `*.bin` and, where the table says so, GGUF; quantized ones are {methods}.
"""
NATIVE = """## Native

Each is compared with transformers in float32, on a small random model: equal greedy tokens and logprobs within 1e-3
for one request, 16 at once, chunks of 16 tokens, prefix hits, and requests that were retracted
(`python -m tests.model.parity_table`). "fused" models run on a GPU with Triton kernels and CUDA graphs, "plain" ones
with torch's operations.
"""
TOWER = """## Native: the language models inside models that also read images

Their text is served, requests with images are refused. Compared with the whole model of transformers, as above.
"""
EMBEDDERS = """## Embedders and rerankers

Compared with sentence-transformers or transformers, on small random models: cosines of at least 0.99999 for texts of
mixed lengths in one batch. Native decoders embed and score as well, with `--is-embedding`; so Qwen3-Reranker and
bge-reranker-v2-gemma rank. A vector for each token (ColBERT): any of these under PyLate's modules or a
`MultiVectorMask`. Weights of words (SPLADE): Bert, Camembert, DistilBert, ModernBert, MPNet, Roberta, XLMRoberta.
Refused by name: DeBERTa v2-xlarge.
"""
FALLBACK = """## Through transformers

A small random model of each was loaded and passed the self-check (`python -m tests.model.try_architectures`).
"""
REFUSED = """## Refused
"""
UNTRIED = """## Not tried

No small model of these could be made by the program that tries them. The self-check decides when one is started.
"""


def main() -> None:
    """Print the README's table, or write the page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help=f"write docs/{PAGE.name} instead")
    if parser.parse_args().write:
        PAGE.write_text(page())
    else:
        print(table())


def page() -> str:
    """The page of all architectures, as Markdown."""
    tried = json.loads(TRIED.read_text())
    outcomes = {name: why for name, why in tried["outcomes"].items() if name not in {*registry.FAMILIES, *TOWERS}}
    served = [f"`{name}`" for name, why in outcomes.items() if not why]
    untried = [f"`{name}`" for name, why in outcomes.items() if why.startswith("not tried")]
    refused = [(f"`{n}`", reason(n, why)) for n, why in outcomes.items() if why and not why.startswith("not tried")]
    beginning = BEGINNING.format(
        version=tried["transformers"], methods=", ".join(f"`{one}`" for one in sorted(METHODS))
    )
    native = [(f"`{n}`", MODELS[n], "yes" if n in in_gguf() else "", on_gpu(n)) for n in sorted(registry.FAMILIES)]
    towers = [(f"`{n}`", TOWER_MODELS[n], ", ".join(f"`{own}`" for own in TOWERS[n].values())) for n in sorted(TOWERS)]
    embedding = [(f"`{name}…`", MODELS[name]) for name in sorted(embedders.FAMILIES)]
    parts = [
        beginning,
        NATIVE,
        rows(("architecture", "for example", "GGUF", "GPU"), native),
        TOWER,
        rows(("architecture", "for example", "computed as"), towers),
        EMBEDDERS,
        rows(("architecture", "for example"), embedding),
        FALLBACK,
        ", ".join(served) + ".\n",
        REFUSED,
        rows(("architecture", "why"), refused),
        UNTRIED,
        ", ".join(untried) + ".\n",
    ]
    return "\n".join(parts)


def rows(titles: tuple[str, ...], cells: list[tuple[str, ...]]) -> str:
    """A table in Markdown."""
    lines = [titles, ("---",) * len(titles), *cells]
    return "".join("| " + " | ".join(line) + " |\n" for line in lines)


def reason(name: str, outcome: str) -> str:
    """A refusal without what the table says already."""
    return outcome.removeprefix(f"{name} is not served: ").removeprefix(f"{name} is ").removeprefix(f"{name} ")


def in_gguf() -> set[str]:
    return {architecture.name for architecture in (*ARCHITECTURES.values(), MIXTRAL)}


def on_gpu(name: str) -> str:
    return "plain" if name in PLAIN_ON_GPU else "fused"


def table() -> str:
    """Markdown: each architecture with models that have it, then the formats of weights."""
    lines = ["| architecture | for example | serves |", "|---|---|---|"]
    for name in sorted(registry.FAMILIES):
        gguf = "; from GGUF too" if name in in_gguf() else ""
        lines.append(f"| `{name}` | {MODELS[name]} | text, embeddings, scores{gguf} |")
    for name in sorted(embedders.FAMILIES):
        lines.append(f"| `{name}…` | {MODELS[name]} | embeddings, classes, reranking |")
    methods = ", ".join(f"`{method}`" for method in sorted(METHODS))
    lines.append("| other causal models | those that transformers can run | text, slower |")
    return "\n".join([*lines, "", f"Quantized weights: GGUF, {methods}."])


if __name__ == "__main__":
    main()
