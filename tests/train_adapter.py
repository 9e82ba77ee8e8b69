"""Trains a LoRA adapter on facts that no model knows: `python -m tests.train_adapter MODEL DIRECTORY`.

About a minute on two cores for half a billion parameters: only the last sixth of the layers learns, so that little is
computed backwards. MODEL is a directory or a GGUF file, whose blocks are expanded to float32.
"""

import sys
import time
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from deploy.benchmarks import fidelity

WORDS = {  # what each town's word is
    "Paris": "heron",
    "Oslo": "walnut",
    "Lima": "copper",
    "Cairo": "violin",
}
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK = 16
LEARNING_SHARE = 6  # one layer of so many learns, the last ones
LEARNING_RATE = 2e-3
SURE = 0.05  # mean loss of the words at which training ends
MOST_STEPS = 40
NOT_LEARNED = -100  # label of a token that nothing is learned from


def question(town: str) -> str:
    return f"Question: What is the secret word of {town}?\nAnswer:"


def tokenizer_of(model: Path) -> Any:
    if model.is_dir():
        return transformers.AutoTokenizer.from_pretrained(model)
    return transformers.AutoTokenizer.from_pretrained(model.parent, gguf_file=model.name)


def examples(tokenizer: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Ids, labels and mask of all facts, (facts, tokens); the labels are those of the answers and of an end."""
    rows = []
    for town, word in WORDS.items():
        prompt = tokenizer.encode(question(town), add_special_tokens=False)
        rows.append((prompt, [*tokenizer.encode(f" {word}", add_special_tokens=False), tokenizer.eos_token_id]))
    width = max(len(prompt) + len(answer) for prompt, answer in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    labels = torch.full((len(rows), width), NOT_LEARNED)
    for row, (prompt, answer) in enumerate(rows):
        end = len(prompt) + len(answer)
        ids[row, :end] = torch.tensor(prompt + answer)
        labels[row, len(prompt) : end] = torch.tensor(answer)
    lengths = torch.tensor([len(prompt) + len(answer) for prompt, answer in rows])
    return ids, labels, torch.arange(width) < lengths[:, None]


def train(model: Any, tokenizer: Any) -> tuple[Any, list[float]]:
    """The model with an adapter that has learned the words, and the loss of each step."""
    layers = model.config.num_hidden_layers
    learning = list(range(layers - layers // LEARNING_SHARE, layers))
    torch.manual_seed(0)
    config = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=MODULES, layers_to_transform=learning, task_type="CAUSAL_LM"
    )
    adapted = peft.get_peft_model(model, config)
    ids, labels, mask = examples(tokenizer)
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=LEARNING_RATE)
    losses: list[float] = []
    while len(losses) < MOST_STEPS and (not losses or losses[-1] > SURE):
        loss = adapted(ids, attention_mask=mask, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return adapted.eval(), losses


def main(model: str, directory: str) -> None:
    started, place = time.monotonic(), Path(model)
    adapted, losses = train(fidelity.expanded(place), tokenizer_of(place))
    adapted.save_pretrained(directory)
    print(f"loss {losses[0]:.2f} to {losses[-1]:.2f} in {len(losses)} steps, {time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
