"""The parity cases: what Quartet answers against what transformers computes for the same tokens.

transformers is teacher-forced: one forward pass over prompt and answer shows for every position which token is the
best and how likely each is. Equal greedy tokens mean that every answer token is the best one at its place.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from tests.engine import ALL_LOGPROBS, Answer, Engine, floats
from tests.model import tiny

NEW_TOKENS = 64
FEW_TOKENS = 24  # of families whose parts others have too
TOLERANCE = 1e-3
BRIEF = (  # families that make few tokens
    *("qwen3_5_moe", "granite_hybrid", "bamba", "falcon_h1", "nemotron_h", "olmo_hybrid", "kimi_linear", "llama4"),
)
FAMILIES = (
    *("llama", "mistral", "qwen2", "qwen3", "phi3", "gemma2", "gemma3", "qwen2_moe", "qwen3_moe", "mixtral"),
    *("olmo2", "olmo3", "smollm3", "granite", "seed_oss", "exaone4", "ministral", "ministral3", "cohere2", "ernie4_5"),
    *("glm4", "glm4_moe", "minimax_m2", "gpt_oss", "deepseek_v2", "deepseek_v3", "glm4_moe_lite"),
    *("lfm2", "qwen3_next", "qwen3_5", "gemma", *BRIEF),
)
FIRST_WORD = 3  # ids below are special


@dataclass
class Outcome:
    """How one case of one family came out."""

    tokens_equal: bool
    error: float  # largest |Δlogprob| over input and output
    cached_tokens: int
    retractions: int


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, tiny.VOCAB_SIZE) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)


def new_tokens(family: str) -> int:
    """How many tokens the requests of a family make."""
    return FEW_TOKENS if family in BRIEF else NEW_TOKENS


def one(directory: Path, tokens: int = NEW_TOKENS) -> tuple[list[list[int]], list[Answer]]:
    prompts = [prompt(random.Random(1), 37)]
    return prompts, Engine(directory).generate(prompts, greedy(tokens), logprobs=ALL_LOGPROBS)


def many(directory: Path, tokens: int = NEW_TOKENS, **settings: int) -> tuple[list[list[int]], list[Answer]]:
    rng = random.Random(2)
    prompts = [prompt(rng, length) for length in (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 50, 64, 90, 120)]
    return prompts, Engine(directory, **settings).generate(prompts, greedy(tokens), logprobs=ALL_LOGPROBS)


def chunked(directory: Path, tokens: int = NEW_TOKENS) -> tuple[list[list[int]], list[Answer]]:
    return many(directory, tokens, chunked_prefill_size=16)


def prefixed(directory: Path, tokens: int = NEW_TOKENS) -> tuple[list[list[int]], list[Answer]]:
    """A first wave fills the prefix tree; the second finds its prefixes there, and its rows share them."""
    rng = random.Random(3)
    engine, common, other = Engine(directory), prompt(rng, 150), prompt(rng, 40)
    engine.generate([common, other], greedy(tokens))
    prompts = [common + prompt(rng, 3 + i) for i in range(5)] + [other + prompt(rng, 9)]
    starts = [148] * 5 + [39]  # prompt positions from here on are computed again, to be scored
    rids = [
        engine.add(ids, greedy(tokens), logprobs=LogprobOptions(start=start))
        for ids, start in zip(prompts, starts, strict=True)
    ]
    engine.run()
    return prompts, [engine.answers[rid] for rid in rids]


def retracted(directory: Path, tokens: int = NEW_TOKENS) -> tuple[list[list[int]], list[Answer]]:
    return many(directory, tokens, max_total_tokens=320, chunked_prefill_size=64)


CASES: dict[str, Callable[[Path, int], tuple[list[list[int]], list[Answer]]]] = {
    "one request": one,
    "16 at once": many,
    "chunks of 16": chunked,
    "prefix hits": prefixed,
    "retraction": retracted,
}


class Peer:
    """transformers' model of the same directory, read by one of its `kinds`."""

    def __init__(self, directory: Path, kind: Any = transformers.AutoModelForCausalLM) -> None:
        self.model = kind.from_pretrained(directory, dtype=torch.float32, attn_implementation="eager")

    @torch.inference_mode()
    def logprobs(self, ids: list[int]) -> torch.Tensor:
        """Row p is the distribution of position p + 1: (positions, vocab)."""
        return torch.log_softmax(self.model(torch.tensor([ids])).logits[0].float(), -1)


def compare(peer: Peer, case: str, directory: Path, tokens: int = NEW_TOKENS) -> Outcome:
    """Run a case on the model of a directory, whose requests make so many tokens."""
    prompts, answers = CASES[case](directory, tokens)
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
