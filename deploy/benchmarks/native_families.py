"""A native family against the same model through transformers' own code, both in this server's scheduler.

    python -m deploy.benchmarks.native_families [FAMILY ...]      # names of tests/model/tiny.py; olmo2 and granite

Random models of 8 layers and 1024 columns in bfloat16, planner and worker in this process. Runs alternate; a ratio is
the median over neighbouring ones of the processor time, which a busy machine disturbs less than time does.
"""

import argparse
import logging
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.model import registry
from quartet.scheduler_service.model.decoder import Decoder
from tests.engine import Engine
from tests.model import tiny

SHAPE: dict[str, Any] = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
}
GEMMA: dict[str, Any] = {
    "head_dim": 64,
    "sliding_window": 512,
    "layer_types": [*["sliding_attention"] * 3, "full_attention"] * 2,
    "num_kv_shared_layers": 4,
    "hidden_size_per_layer_input": 128,
    "vocab_size_per_layer_input": 32000,
}
SHAPES: dict[str, dict[str, Any]] = {  # what families need besides
    "gemma3n": {
        **GEMMA,
        "intermediate_size": [3072] * 8,
        "activation_sparsity_pattern": [0.95] * 4 + [0.0] * 4,
        "laurel_rank": 64,
    },
    "gemma4": {**GEMMA, "global_head_dim": 128},
    "gemma4_moe": {**GEMMA, "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "global_head_dim": 128},
}
LOADS = {"one stream, 48 tokens": (1, 64, 48), "16 at once, 32 tokens": (16, 64, 32), "a prompt of 1024": (1, 1024, 1)}
ROUNDS = 5


def main() -> None:
    """Print the ratios of each family."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", default=["olmo2", "granite"])
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    logging.disable(logging.WARNING)
    asked = parser.parse_args()
    for family in asked.families:
        with tempfile.TemporaryDirectory() as name:
            shape = {**SHAPE, **SHAPES.get(family, {})}
            directory = tiny.build(family, Path(name), dtype=torch.bfloat16, **shape)
            compare(family, directory, asked.rounds)


def compare(family: str, directory: Path, rounds: int) -> None:
    """Print processor time of both ways, load by load."""
    settings: dict[str, Any] = {"dtype": "bfloat16", "disable_radix_cache": True, "max_total_tokens": 8192}
    native = Engine(directory, **settings)
    families, registry.FAMILIES = registry.FAMILIES, {}
    try:
        fallback = Engine(directory, **settings)
    finally:
        registry.FAMILIES = families
    assert isinstance(native.worker.model, Decoder) and not isinstance(fallback.worker.model, Decoder)
    for load, (requests, prompt, tokens) in LOADS.items():
        pairs = [(seconds(native, requests, prompt, tokens), seconds(fallback, requests, prompt, tokens))
                 for _ in range(rounds + 1)][1:]  # fmt: skip
        ours, theirs = (statistics.median(side) for side in zip(*pairs, strict=True))
        ratio = statistics.median(their / own for own, their in pairs)
        print(
            f"{family:>10}  {load:>22}: native {ours:.3f} s, through transformers {theirs:.3f} s, ratio {ratio:.2f}",
            flush=True,
        )


def seconds(engine: Engine, requests: int, prompt: int, tokens: int) -> float:
    """Processor time for some random prompts."""
    draw = random.Random(1)
    prompts = [[draw.randrange(3, SHAPE["vocab_size"]) for _ in range(prompt)] for _ in range(requests)]
    begun = time.process_time()
    engine.generate(prompts, SamplingParams(temperature=0.0, max_new_tokens=tokens, ignore_eos=True))
    return time.process_time() - begun


if __name__ == "__main__":
    main()
