"""Hybrid models with the kernels of recurrent layers, with the same in torch, and through transformers' own code.

    python -m deploy.benchmarks.hybrids [FAMILY ...]      # names of SHAPES; all of them

Random models of 0.15 to 0.3 billion parameters in bfloat16, planner and worker in this process. The three sides take
turns; a ratio is the median over neighbouring runs of the processor time, which a busy machine disturbs less than time
does.
"""

import argparse
import logging
import random
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers

from quartet.runtime.sampling import SamplingParams
from tests.engine import Engine
from tests.model import tiny

COMMON: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
SHAPES: dict[str, dict[str, Any]] = {
    "falcon_h1": {  # Falcon-H1 0.5B, a third of its layers
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "mamba_d_ssm": 1536,
        "mamba_n_heads": 24,
        "mamba_d_head": 64,
        "mamba_d_state": 128,
        "mamba_n_groups": 1,
    },
    "qwen3_5": {  # Qwen3.5 0.8B, half of its layers
        "intermediate_size": 3584,
        "num_hidden_layers": 12,
        "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 3,
        "num_attention_heads": 8,
        "num_key_value_heads": 2,
        "head_dim": 256,
        "linear_key_head_dim": 128,
        "linear_value_head_dim": 128,
        "linear_num_key_heads": 16,
        "linear_num_value_heads": 16,
    },
    "lfm2": {  # LFM2 350M
        "intermediate_size": 6656,
        "num_hidden_layers": 16,
        "layer_types": ["full_attention" if i in (2, 5, 8, 10, 12, 14) else "conv" for i in range(16)],
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "tie_embedding": True,
    },
}
LOADS = {"one stream, 24 tokens": (1, 8, 24), "16 at once, 12 tokens": (16, 8, 12), "a prompt of 1024": (1, 1024, 1)}
Side = Callable[[list[list[int]], int], None]


def main() -> None:
    """Print the times and ratios of each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="FAMILY", help=f"of {', '.join(SHAPES)}")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, help="1 leaves out what threads cost that wait for a busy machine")
    asked = parser.parse_args()
    if unknown := set(asked.families) - SHAPES.keys():
        parser.error(f"{', '.join(sorted(unknown))}: the families are {', '.join(SHAPES)}")
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    for family in asked.families or SHAPES:
        with tempfile.TemporaryDirectory() as name:
            directory = tiny.build(family, Path(name), dtype=torch.bfloat16, **COMMON, **SHAPES[family])
            sides = sides_of(directory)
            if asked.threads is not None:
                torch.set_num_threads(asked.threads)
            compare(family, sides, asked.rounds)


def sides_of(directory: Path) -> dict[str, Side]:
    """What serves the same prompts, by name."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "disable_radix_cache": True, "max_total_tokens": 4096}
    kernels, plain = (Engine(directory, max_running_requests=16, **settings) for _ in range(2))
    assert kernels.worker.state_cache is not None and plain.worker.state_cache is not None
    assert kernels.worker.state_cache.kernels is not None, "no kernels on this machine"
    plain.worker.state_cache.kernels = None
    peer = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    return {"kernels": served_by(kernels), "torch": served_by(plain), "transformers": generated_by(peer)}


def served_by(engine: Engine) -> Side:
    def serve(prompts: list[list[int]], tokens: int) -> None:
        engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True))

    return serve


def generated_by(model: transformers.PreTrainedModel) -> Side:
    @torch.inference_mode()
    def generate(prompts: list[list[int]], tokens: int) -> None:
        ids = torch.tensor(prompts)
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False}
        model.generate(ids, attention_mask=torch.ones_like(ids), **settings)

    return generate


def compare(family: str, sides: dict[str, Side], rounds: int) -> None:
    """Print each side's processor time, and its ratio to the first side's, load by load."""
    for load, (requests, length, tokens) in LOADS.items():
        draw = random.Random(1)
        prompts = [[draw.randrange(3, COMMON["vocab_size"]) for _ in range(length)] for _ in range(requests)]
        found = [
            {name: seconds(side, prompts, tokens) for name, side in sides.items()} for _ in range(rounds + 1)
        ]  # the first round warms up
        first = next(iter(sides))
        cells = [
            f"{name} {statistics.median(run[name] for run in found[1:]):.3f} s"
            f" ({statistics.median(run[name] / run[first] for run in found[1:]):.2f})"
            for name in sides
        ]
        print(f"{family:>10}  {load:>22}: {', '.join(cells)}", flush=True)


def seconds(side: Side, prompts: list[list[int]], tokens: int) -> float:
    """Processor time of one run."""
    begun = time.process_time()
    side(prompts, tokens)
    return time.process_time() - begun


if __name__ == "__main__":
    main()
