"""The names of the architectures that Quartet computes itself, for whoever must not import what computes them."""

import difflib
import re

from quartet.runtime.model_files.towers import TOWERS

MAX_LETTERS = 80  # of a name that are looked at
NATIVE = (
    "BambaForCausalLM",
    "Cohere2ForCausalLM",
    "DeepseekV2ForCausalLM",
    "DeepseekV3ForCausalLM",
    "Ernie4_5ForCausalLM",
    "Exaone4ForCausalLM",
    "FalconH1ForCausalLM",
    "GemmaForCausalLM",
    "Gemma2ForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma3nForCausalLM",
    "Gemma4ForCausalLM",
    "Gemma4UnifiedForCausalLM",
    "Glm4ForCausalLM",
    "Glm4MoeForCausalLM",
    "Glm4MoeLiteForCausalLM",
    "GptOssForCausalLM",
    "GraniteForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "KimiLinearForCausalLM",
    "Lfm2ForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "MiniMaxM2ForCausalLM",
    "Ministral3ForCausalLM",
    "MinistralForCausalLM",
    "MistralForCausalLM",
    "MixtralForCausalLM",
    "NemotronHForCausalLM",
    "Olmo2ForCausalLM",
    "Olmo3ForCausalLM",
    "OlmoHybridForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen2MoeForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "Qwen3_5ForCausalLM",
    "Qwen3_5MoeForCausalLM",
    "SeedOssForCausalLM",
    "SmolLM3ForCausalLM",
)
ENDING = re.compile(r"For[A-Z]|LMHead")
LEAST_ALIKE = 0.6  # of names without their endings


def nearest(architecture: str) -> str | None:
    """The architecture of ours whose name is most like another; None where none is alike."""

    def alike(name: str) -> tuple[float, float]:
        return likeness(stem(name), stem(architecture)), likeness(name, architecture)

    best = max((*TOWERS, *NATIVE), key=alike)
    return best if alike(best)[0] >= LEAST_ALIKE else None


def stem(architecture: str) -> str:
    """A name without its ending, in small letters."""
    return ENDING.split(architecture[:MAX_LETTERS])[0].lower()


def likeness(one: str, other: str) -> float:
    """From 0 for names without a common letter to 1 for the same."""
    return difflib.SequenceMatcher(None, one[:MAX_LETTERS], other[:MAX_LETTERS]).ratio()
