"""What Quartet answers (`cases.py`) against what transformers computes for the same tokens.

transformers is teacher-forced: one forward pass over prompt and answer shows for every position which token is the
best and how likely each is. Equal greedy tokens mean that every answer token is the best one at its place.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from tests.engine import Answer, floats
from tests.model.cases import CASES, NEW_TOKENS, prompt

__all__ = ["CASES", "FAMILIES", "NEW_TOKENS", "TOLERANCE", "Outcome", "Peer", "compare", "prompt"]

TOLERANCE = 1e-3
FEW_TOKENS = 12  # of families whose parts others have too
BRIEF = (  # families that make few tokens
    *("qwen3_5_moe", "granite_hybrid", "bamba", "falcon_h1", "nemotron_h", "olmo_hybrid", "kimi_linear", "llama4"),
    *("gemma3n", "gemma4_moe", "gemma4_unified"),
)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe", "mixtral"),
    *("olmo2", "olmo3", "smollm3", "granite", "seed_oss", "exaone4", "ministral", "ministral3", "cohere2", "ernie4_5"),
    *("glm4", "glm4_moe", "minimax_m2", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    *("lfm2", "qwen3_next", "qwen3_5", "gemma", "gemma4", *BRIEF),
)


@dataclass
class Outcome:
    """How one case of one family came out."""

    tokens_equal: bool
    error: float  # largest |Δlogprob| over input and output
    cached_tokens: int
    retractions: int


def new_tokens(family: str) -> int:
    """How many tokens the requests of a family make."""
    return FEW_TOKENS if family in BRIEF else NEW_TOKENS


class Peer:
    """transformers' model of the same directory, read by one of its `kinds`."""

    def __init__(self, directory: Path, kind: Any = transformers.AutoModelForCausalLM) -> None:
        self.model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Row p is the distribution of position p + 1: (positions, vocab)."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)


def compare(peer: Peer, prompts: list[list[int]], answers: list[Answer], tokens: int = NEW_TOKENS) -> Outcome:
    """`tokens`: how many each request made."""
    equal, error = True, 0.0
    for ids, answer in zip(prompts, answers, strict=True):
        expected = peer.logprobs(ids + answer.ids)
        ahead = expected[len(ids) - 1 : -1]  # (new tokens, vocab)
        equal &= len(answer.ids) == tokens and ahead.argmax(1).tolist() == answer.ids
        error = max(error, output_error(ahead, answer), input_error(expected, ids, answer))
    return Outcome(equal, error, sum(a.cached_tokens for a in answers), sum(a.retractions for a in answers))


def output_error(ahead: torch.Tensor, answer: Answer) -> float:
    assert answer.logprobs is not None
    values = torch.tensor(floats(answer.logprobs.values))
    return float((ahead.gather(1, torch.tensor(answer.ids).unsqueeze(1)).squeeze(1) - values).abs().max())


def input_error(expected: torch.Tensor, ids: list[int], answer: Answer) -> float:
    """Over the prompt's last positions: as many as the answer has, but for the first, which has no logprob."""
    assert answer.input_logprobs is not None
    values = torch.tensor(floats(answer.input_logprobs.values))
    scored = len(values) - 1
    if scored < 1:
        return 0.0
    assert values[0].isnan() and not values[1:].isnan().any()
    start = len(ids) - scored
    its = expected[start - 1 : len(ids) - 1].gather(1, torch.tensor(ids[start:]).unsqueeze(1)).squeeze(1)
    return float((its - values[1:]).abs().max())
