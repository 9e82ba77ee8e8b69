"""What the scheduler may do to requests, five cases of it: prompts, and what Quartet answers. Without transformers."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.sampling import SamplingParams
from tests.engine import ALL_LOGPROBS, Answer, Engine

VOCAB_SIZE = 320  # of the tiny models
NEW_TOKENS = 64
FIRST_WORD = 3  # ids below are special


def prompt(rng: random.Random, length: int) -> list[int]:
    return [rng.randrange(FIRST_WORD, VOCAB_SIZE) for _ in range(length)]


def greedy(tokens: int) -> SamplingParams:
    return SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True)


def one(directory: Path, tokens: int = NEW_TOKENS, **settings: Any) -> tuple[list[list[int]], list[Answer]]:
    prompts = [prompt(random.Random(1), 37)]
    return prompts, Engine(directory, **settings).generate(prompts, greedy(tokens), logprobs=ALL_LOGPROBS)


def many(directory: Path, tokens: int = NEW_TOKENS, **settings: Any) -> tuple[list[list[int]], list[Answer]]:
    rng = random.Random(2)
    prompts = [prompt(rng, length) for length in (1, 2, 3, 5, 8, 13, 16, 17, 24, 31, 32, 33, 50, 64, 90, 120)]
    return prompts, Engine(directory, **settings).generate(prompts, greedy(tokens), logprobs=ALL_LOGPROBS)


def chunked(directory: Path, tokens: int = NEW_TOKENS, **settings: Any) -> tuple[list[list[int]], list[Answer]]:
    return many(directory, tokens, chunked_prefill_size=16, **settings)


def prefixed(directory: Path, tokens: int = NEW_TOKENS, **settings: Any) -> tuple[list[list[int]], list[Answer]]:
    """A first wave fills the prefix tree; the second finds its prefixes there, and its rows share them."""
    rng = random.Random(3)
    engine, common, other = Engine(directory, **settings), prompt(rng, 150), prompt(rng, 40)
    engine.generate([common, other], greedy(tokens))
    prompts = [common + prompt(rng, 3 + i) for i in range(5)] + [other + prompt(rng, 9)]
    starts = [148] * 5 + [39]  # prompt positions from here on are computed again, to be scored
    rids = [
        engine.add(ids, greedy(tokens), logprobs=LogprobOptions(start=start))
        for ids, start in zip(prompts, starts, strict=True)
    ]
    engine.run()
    return prompts, [engine.answers[rid] for rid in rids]


def retracted(directory: Path, tokens: int = NEW_TOKENS, **settings: Any) -> tuple[list[list[int]], list[Answer]]:
    return many(directory, tokens, max_total_tokens=320, chunked_prefill_size=64, **settings)


CASES: dict[str, Callable[..., tuple[list[list[int]], list[Answer]]]] = {
    "one request": one,
    "16 at once": many,
    "chunks of 16": chunked,
    "prefix hits": prefixed,
    "retraction": retracted,
}
