"""peft's adapters on transformers' model, in float32: what a server of the same files must answer.

models = PeftModels(base)
models.add("a", rank=8, seed=1)
path = models.save("a", directory)
models.check("a", prompt, answer)      # of /generate with return_logprob and temperature 0
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

peft = pytest.importorskip("peft", reason="peft is not installed (pip install peft)")

MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
TOLERANCE = 1e-3  # of logprobs


class PeftModels:
    """One model, and adapters of it by name; "" is the model alone."""

    def __init__(self, base: Path) -> None:
        self._base = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
        self._model: Any = None  # peft's, once there is an adapter

    def add(self, name: str, rank: int, seed: int, **settings: Any) -> None:
        """A random adapter of all linear layers."""
        config = peft.LoraConfig(
            r=rank, target_modules=MODULES, init_lora_weights=False, **{"lora_alpha": 2 * rank, **settings}
        )
        torch.manual_seed(seed)
        if self._model is None:
            self._model = peft.get_peft_model(self._base, config, adapter_name=name).eval()
        else:
            self._model.add_adapter(name, config)

    def save(self, name: str, directory: Path) -> Path:
        """The adapter in peft's format."""
        self._model.save_pretrained(str(directory), selected_adapters=[name])
        return directory / name

    def logprobs(self, ids: Sequence[int], parts: Sequence[tuple[str, int]]) -> torch.Tensor:
        """Of every next token. `parts`: adapters and up to which input each computes, keys and values included."""
        rows, past, start = [], None, 0
        for name, end in parts:
            logits, past = self._forward(name, torch.tensor([list(ids[start:end])]), past)
            rows.append(logits)
            start = end
        return torch.cat(rows).float().log_softmax(-1)  # (inputs, vocabulary)

    @torch.no_grad()
    def _forward(self, name: str, ids: torch.Tensor, past: Any) -> tuple[torch.Tensor, Any]:
        if name:
            self._model.set_adapter(name)
            out = self._model(ids, past_key_values=past, use_cache=True)
        elif self._model is None:
            out = self._base(ids, past_key_values=past, use_cache=True)
        else:
            with self._model.disable_adapter():
                out = self._model(ids, past_key_values=past, use_cache=True)
        return out.logits[0], out.past_key_values

    def check(self, name: str, prompt: list[int], answer: dict[str, Any]) -> None:
        """An answer is what an adapter gives: equal tokens, logprobs within TOLERANCE."""
        self.check_parts([(name, len(answer["output_ids"]))], prompt, answer)

    def check_parts(self, parts: Sequence[tuple[str, int]], prompt: list[int], answer: dict[str, Any]) -> None:
        """The same of an answer that several adapters made: each up to some number of output tokens.

        The first one has computed the prompt, and nothing is computed again by a later one.
        """
        output = answer["output_ids"]
        inputs = [(name, len(prompt) + end - 1) for name, end in parts]
        expected = self.logprobs([*prompt, *output], inputs)[len(prompt) - 1 :]
        assert output == expected.argmax(-1).tolist(), parts
        told = torch.tensor([logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]])
        difference = float((told - expected.max(-1).values).abs().max())
        assert difference <= TOLERANCE, (parts, difference)
