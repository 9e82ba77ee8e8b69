"""What is learned: stories as we wish them. Prompts, samples from the server, rewards and advantages; no torch."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean, pstdev
from typing import Any

PROMPTS = ("Tell me a story.", "Write a short story.", "Please tell me a short story.")
MAX_NEW_TOKENS = 56
FLAT = 1e-6  # a group whose rewards differ less teaches nothing


@dataclass(frozen=True)
class Rollout:
    """One sampled answer, as the server describes it."""

    prompt_ids: list[int]
    output_ids: list[int]
    logprobs: list[float]  # of the output ids, under the weights that sampled them
    text: str
    finished: bool  # by itself, not at the length limit
    versions: list[dict[str, Any]]  # runs of output tokens: version, start, end, and an adapter's adapter_version

    @classmethod
    def of(cls, prompt_ids: list[int], answer: dict[str, Any]) -> "Rollout":
        meta = answer["meta_info"]
        return cls(
            prompt_ids,
            answer["output_ids"],
            [logprob for logprob, _, _ in meta["output_token_logprobs"]],
            answer["text"],
            meta["finish_reason"]["type"] == "stop",
            meta["weight_versions"],
        )


# The reward is the share of these that come true.
WISHES: dict[str, Callable[[Rollout], bool]] = {
    "about a fox": lambda rollout: "fox" in rollout.text,
    "somebody speaks": lambda rollout: rollout.text.count('"') >= 2,
    "comes to an end": lambda rollout: rollout.finished,
}


def reward(rollout: Rollout) -> float:
    return fmean(wish(rollout) for wish in WISHES.values())


def request(prompts: Sequence[list[int]], samples: int, seed: int, lora_path: str | None) -> dict[str, Any]:
    """The body for /generate: `samples` answers to each prompt, drawn from the distribution of the model or adapter."""
    drawn = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "max_new_tokens": MAX_NEW_TOKENS, "n": samples}
    return {
        "input_ids": list(prompts),
        "sampling_params": [drawn | {"sampling_seed": seed + i * samples} for i in range(len(prompts))],
        "return_logprob": True,
        "lora_path": lora_path,
    }


def groups(prompts: Sequence[list[int]], answers: list[dict[str, Any]]) -> list[list[Rollout]]:
    """The answers to each prompt."""
    samples = len(answers) // len(prompts)
    return [
        [Rollout.of(prompt, answer) for answer in answers[i * samples : (i + 1) * samples]]
        for i, prompt in enumerate(prompts)
    ]


def advantages(group: list[Rollout]) -> list[float]:
    """How much better each answer is than its group, in standard deviations of the group."""
    rewards = [reward(rollout) for rollout in group]
    mean, deviation = fmean(rewards), pstdev(rewards)
    return [(r - mean) / deviation if deviation > FLAT else 0.0 for r in rewards]
