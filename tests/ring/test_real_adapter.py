"""An adapter that is trained on a real model here, served on its float32 weights and on the file's own blocks."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import requests
import torch

from deploy.benchmarks import fidelity
from tests import real_models
from tests.real_models import QWEN
from tests.servers import Server

pytestmark = [pytest.mark.slow, pytest.mark.real_models, pytest.mark.timeout(900)]

WAIT_S = 240
TOKENS = 16
TOLERANCE = 1e-3  # of logprobs in float32
OTHERS = ["The capital of France is", "def quicksort(xs):\n", "Question: What is the capital of Norway?\nAnswer:"]
FLAGS = ("--max-total-tokens", "8192", "--disable-standby", "--skip-server-warmup", "--device", "cpu")


class Trained:
    """A real model, an adapter of it that has learned some words, and where both lie."""

    def __init__(self, directory: Path) -> None:
        pytest.importorskip(
            "gguf", reason="transformers reads GGUF files with the gguf package, which is not installed"
        )
        pytest.importorskip("peft", reason="peft is not installed (pip install peft)")
        from tests import train_adapter

        self.file = real_models.or_skip(QWEN)
        self.words = train_adapter.WORDS
        self.question = train_adapter.question
        self.tokenizer = train_adapter.tokenizer_of(self.file)
        model = fidelity.expanded(self.file).eval()
        self.base, self.adapter = directory / "base", directory / "words"
        model.save_pretrained(self.base)
        self.tokenizer.save_pretrained(self.base)
        self.model, self.losses = train_adapter.train(model, self.tokenizer)
        self.model.save_pretrained(self.adapter)

    def logprobs(self, ids: list[int], adapter: bool) -> torch.Tensor:
        """peft's, of every next token."""
        with torch.no_grad():
            if adapter:
                return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)
            with self.model.disable_adapter():
                return self.model(torch.tensor([ids])).logits[0].log_softmax(-1)

    def check(self, prompt: str, answer: dict[str, Any], adapter: bool) -> None:
        """A greedy answer is peft's: equal tokens, logprobs within TOLERANCE."""
        ids, output = self.tokenizer.encode(prompt, add_special_tokens=False), answer["output_ids"]
        assert answer["meta_info"]["prompt_tokens"] == len(ids)
        expected = self.logprobs([*ids, *output], adapter)[len(ids) - 1 : -1]
        assert output == expected.argmax(-1).tolist(), prompt
        told = torch.tensor([logprob for logprob, _, _ in answer["meta_info"]["output_token_logprobs"]])
        assert float((told - expected.max(-1).values).abs().max()) <= TOLERANCE, prompt


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    return Trained(tmp_path_factory.mktemp("trained"))


def ask(server: Server, prompts: list[str], adapters: list[str | None]) -> list[dict[str, Any]]:
    """A greedy batch."""
    params = {"temperature": 0, "max_new_tokens": TOKENS}
    body = {"text": prompts, "sampling_params": params, "return_logprob": True, "lora_path": adapters}
    answer = requests.post(f"{server.url}/generate", json=body, timeout=WAIT_S)
    assert answer.status_code == 200, answer.text
    answers: list[dict[str, Any]] = answer.json()
    return answers


def knows(trained: Trained, server: Server, adapter: str | None) -> int:
    """How many of the words are answered."""
    prompts = [trained.question(town) for town in trained.words]
    answers = ask(server, prompts, [adapter] * len(prompts))
    return sum(answer["text"].strip() == word for answer, word in zip(answers, trained.words.values(), strict=True))


def test_a_trained_adapter_answers_what_it_was_trained_for_as_peft_does(
    trained: Trained, launch: Callable[..., Server]
) -> None:
    assert trained.losses[-1] < 0.1 < 1 < trained.losses[0]
    lora = ("--lora-paths", f"words={trained.adapter}", "--dtype", "float32")
    server = launch("--model-path", str(trained.base), *FLAGS, *lora)
    assert (knows(trained, server, None), knows(trained, server, "words")) == (0, len(trained.words))
    prompts = [*map(trained.question, trained.words), *OTHERS]
    both = prompts + prompts
    adapters = [None] * len(prompts) + ["words"] * len(prompts)
    for prompt, adapter, answer in zip(both, adapters, ask(server, both, adapters), strict=True):
        trained.check(prompt, answer, adapter is not None)


def test_it_answers_so_on_the_quantized_blocks_of_the_file_too(trained: Trained, launch: Callable[..., Server]) -> None:
    server = launch("--model-path", str(trained.file), *FLAGS, "--enable-lora")
    body = {"lora_name": "words", "lora_path": str(trained.adapter)}
    assert requests.post(f"{server.url}/load_lora_adapter", json=body, timeout=WAIT_S).ok
    assert (knows(trained, server, None), knows(trained, server, "words")) == (0, len(trained.words))
