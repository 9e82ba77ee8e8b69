"""The trainer's copy of the model, in torch: logprobs of what the server sampled, one clipped step, a checkpoint."""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from deploy.examples.rl_hot_swap.rollouts import Rollout

CLIP = 0.2  # how far the ratio of new to old probability may move a token's weight
LARGEST_GRADIENT = 1.0


class Batch(NamedTuple):
    """Rollouts side by side, padded on the right; the outputs are the tokens that are learned from."""

    ids: torch.Tensor  # (rollouts, tokens)
    is_output: torch.Tensor  # (rollouts, tokens - 1), of the token that follows
    server_logprobs: torch.Tensor  # (rollouts, tokens - 1), 0 where there is no output

    @classmethod
    def of(cls, rollouts: list[Rollout]) -> "Batch":
        ids = pad_sequence([torch.tensor(r.prompt_ids + r.output_ids) for r in rollouts], batch_first=True)
        is_output = torch.zeros(ids.shape[0], ids.shape[1] - 1, dtype=torch.bool)
        logprobs = torch.zeros(is_output.shape)
        for row, rollout in enumerate(rollouts):
            start = len(rollout.prompt_ids) - 1
            end = start + len(rollout.output_ids)
            is_output[row, start:end] = True
            logprobs[row, start:end] = torch.tensor(rollout.logprobs)
        return cls(ids, is_output, logprobs)


class Policy:
    """A causal language model that learns, as a whole or by a LoRA adapter; the server reads what it saves."""

    def __init__(self, model_path: str, learning_rate: float, lora_rank: int = 0) -> None:
        """`lora_rank`: of an adapter of all linear layers; 0: all weights learn."""
        logging.disable_progress_bar()
        self.tokenizer = AutoTokenizer.from_pretrained(model_path)
        self._model = AutoModelForCausalLM.from_pretrained(model_path, dtype=torch.float32)
        if lora_rank:
            self._model = adapted(self._model, lora_rank)
        self._adapted = lora_rank > 0
        learning = [parameter for parameter in self._model.parameters() if parameter.requires_grad]
        self._optimizer = torch.optim.AdamW(learning, lr=learning_rate, weight_decay=0.0)

    def prompt_ids(self, text: str) -> list[int]:
        """A user's turn in the model's chat template."""
        turn = [{"role": "user", "content": text}]
        rendered = self.tokenizer.apply_chat_template(turn, add_generation_prompt=True, tokenize=False)
        return list(self.tokenizer.encode(rendered, add_special_tokens=False))

    def logprobs(self, batch: Batch) -> torch.Tensor:
        """Of every next token; padding comes last, so a causal model needs no mask for it."""
        logits = self._model(batch.ids[:, :-1], use_cache=False).logits.float()  # (rollouts, tokens - 1, vocabulary)
        chosen = batch.ids[:, 1:, None]
        return logits.log_softmax(dim=-1).gather(-1, chosen).squeeze(-1)  # (rollouts, tokens - 1)

    def learn(self, batch: Batch, advantages: list[float]) -> float:
        """One step of the clipped policy gradient, with the server's logprobs as those of the old policy.

        Returns the largest difference between our logprob of an output token, before the step, and the server's.
        """
        better = torch.tensor(advantages)[:, None]  # (rollouts, 1)
        moved = self.logprobs(batch) - batch.server_logprobs  # (rollouts, tokens - 1)
        ratio = moved.exp()
        gain = torch.minimum(ratio * better, ratio.clamp(1 - CLIP, 1 + CLIP) * better)
        self._optimizer.zero_grad()
        (-gain[batch.is_output].mean()).backward()
        torch.nn.utils.clip_grad_norm_(self._model.parameters(), LARGEST_GRADIENT)
        self._optimizer.step()
        return float(moved.detach()[batch.is_output].abs().max())

    def save(self, directory: Path) -> None:
        """A checkpoint that a server can swap in, or start with; of an adapter, its files in peft's format."""
        self._model.save_pretrained(directory)
        if not self._adapted:
            self.tokenizer.save_pretrained(directory)


def adapted(model: Any, rank: int) -> Any:
    """The model with an adapter that changes nothing yet; the weights below it do not learn."""
    try:
        import peft
    except ModuleNotFoundError as error:
        raise SystemExit(f"{error}; an adapter needs peft: pip install peft") from error
    torch.manual_seed(0)
    return peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))
