"""Trains the demo model from nothing: `python -m deploy.demo_model.train [--out FOLDER] [--steps N]`.

The tokenizer, the text and the weights all come from the seed. The same seed, thread count, PyTorch build and kind of
processor give the same file; on another processor the sums round differently and the weights differ slightly.
"""

import argparse
import json
import os
import shutil
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from statistics import fmean

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is imported

import torch
from safetensors.torch import save as safetensors_bytes
from tokenizers import Tokenizer
from torch.nn.functional import cross_entropy
from transformers import Qwen3Config, Qwen3ForCausalLM

from deploy.demo_model import vocabulary
from deploy.demo_model.batches import Batch, batches
from deploy.demo_model.corpus import SEED
from quartet.runtime.model_files.model_info import DEMO

HAND_WRITTEN = ("config.json", "generation_config.json", "tokenizer_config.json", "chat_template.jinja")
THREADS = 2
STEPS = 1500
WARMUP_SHARE = 0.02
DECAY_SHARE = 0.6  # the rate falls in a straight line over this last part of the run
MATRIX_RATE = 6e-3
VECTOR_RATE = 4e-3
WEIGHT_DECAY = 0.05
REPORT_EVERY = 50


def rate_factor(step: int, steps: int) -> float:
    """The share of the learning rate at this step: a short rise, a plateau, a straight fall to nothing."""
    rise = (step + 1) / (WARMUP_SHARE * steps)
    fall = (steps - step) / (DECAY_SHARE * steps)
    return min(1.0, rise, fall)


def optimizers(model: Qwen3ForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the layers, AdamW for the embedding and the norms."""
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    others = [p for name, p in model.named_parameters() if p.ndim != 2 or "embed" in name]
    return [
        torch.optim.Muon(matrices, lr=MATRIX_RATE, weight_decay=WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=VECTOR_RATE, betas=(0.9, 0.98), weight_decay=0.0),
    ]


def loss_of(model: Qwen3ForCausalLM, batch: Batch) -> torch.Tensor:
    """The weighted mean of the next-token loss."""
    ids, weights = batch
    with torch.autocast("cpu", dtype=torch.bfloat16):  # two to three times as fast as fp32 on a CPU with bf16
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].float()  # (rows, length - 1, vocab)
    losses = cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weights = weights[:, 1:].flatten()
    return (losses * weights).sum() / weights.sum()


def train(model: Qwen3ForCausalLM, source: Iterator[Batch], steps: int) -> float:
    """Run the training; the mean loss over its last steps."""
    chosen = optimizers(model)
    schedules = [torch.optim.lr_scheduler.LambdaLR(o, lambda step: rate_factor(step, steps)) for o in chosen]
    recent: deque[float] = deque(maxlen=REPORT_EVERY)
    start_s, tokens = time.monotonic(), 0
    for step in range(1, steps + 1):
        batch = next(source)
        loss = loss_of(model, batch)
        torch.autograd.backward(loss)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer, schedule in zip(chosen, schedules, strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
        tokens += batch[0].numel()
        recent.append(loss.item())
        if step % REPORT_EVERY == 0:
            minutes = (time.monotonic() - start_s) / 60
            print(f"step {step} loss {fmean(recent):.4f} {tokens:,} tokens {minutes:.1f} min", flush=True)
    return fmean(recent)


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write a directory in the Hugging Face form: bf16 weights, the tied output head left out."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {
        name: tensor.to(torch.bfloat16).contiguous()
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    (folder / "model.safetensors").write_bytes(safetensors_bytes(weights, metadata={"format": "pt"}))
    tokenizer.save(str(folder / "tokenizer.json"))
    for name in HAND_WRITTEN:
        if folder.resolve() != DEMO:
            shutil.copy(DEMO / name, folder / name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, default=DEMO, help="folder to write (default: the one in the package)")
    parser.add_argument("--steps", type=int, default=STEPS, help="training steps (default: %(default)s)")
    arguments = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    config = Qwen3Config(**json.loads((DEMO / "config.json").read_text()) | {"dtype": "float32"})
    tokenizer = vocabulary.learn(config.vocab_size, SEED)
    model = Qwen3ForCausalLM(config)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters", flush=True)
    loss = train(model, batches(tokenizer, SEED), arguments.steps)
    save(model, tokenizer, arguments.out)
    print(f"loss {loss:.4f}, written to {arguments.out}")


if __name__ == "__main__":
    main()
