"""Prints how Quartet compares with transformers: `python -m tests.model.parity_table [--tp-size 2] [family ...]`.

A cell is the largest |Δlogprob| over input and output; the greedy tokens must be equal as well. With `--tp-size 2` two
processes compute the models together, those that can be divided.
"""

import argparse
import logging
import os
import sys
import tempfile
from pathlib import Path

import torch
import transformers

from tests.model import parity, tiny
from tests.ranks import run_ranks, serve_cases

DIVISIBLE = [
    *("llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3", "gemma3n", "gemma4", "gemma4_moe", "gemma4_unified"),
    *("qwen2_moe", "qwen3_moe", "mixtral", "phi3", "glm4"),
    *("qwen3_next", "qwen3_5", "qwen3_5_moe", "granite_hybrid", "nemotron_h", "falcon_h1", "bamba", "lfm2"),
    *("olmo_hybrid", "olmo2", "olmo3", "minimax_m2", "deepseek_v2", "deepseek_v3", "glm4_moe_lite", "kimi_linear"),
]


def main(families: list[str], ranks: int = 1) -> int:
    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    transformers.utils.logging.disable_progress_bar()
    print(f"fp32, {parity.NEW_TOKENS} new tokens, largest |Δlogprob|; the limit is {parity.TOLERANCE}")
    print("".join(f"{title:>14}" for title in ("family", *parity.CASES, "cached", "retracted")))
    failed = 0
    for family in families:
        outcomes = run(family) if ranks == 1 else run_divided(family, ranks)
        cells = [cell(outcome) for outcome in outcomes]
        counts = (max(outcome.cached_tokens for outcome in outcomes), max(outcome.retractions for outcome in outcomes))
        print("".join(f"{text:>14}" for text in (family, *cells, *counts)), flush=True)
        failed += not all(passed(outcome) for outcome in outcomes)
    print("all agree" if not failed else f"{failed} families differ")
    return min(failed, 1)


def run(family: str) -> list[parity.Outcome]:
    with tempfile.TemporaryDirectory() as name:
        directory = tiny.build(family, Path(name))
        peer = parity.Peer(directory)
        with open(os.devnull, "w") as quiet:  # the loader's progress bars
            stderr, sys.stderr = sys.stderr, quiet
            try:
                return [parity.compare(peer, *parity.CASES[case](directory)) for case in parity.CASES]
            finally:
                sys.stderr = stderr


def run_divided(family: str, ranks: int) -> list[parity.Outcome]:
    """The same by several ranks."""
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        peer = parity.Peer(tiny.build(family, directory / family))
        served, *_ = run_ranks(ranks, directory, serve_cases, directory, {family: list(parity.CASES)})
        return [parity.compare(peer, *served[family, case]) for case in parity.CASES]


def passed(outcome: parity.Outcome) -> bool:
    return outcome.tokens_equal and outcome.error <= parity.TOLERANCE


def cell(outcome: parity.Outcome) -> str:
    return f"{outcome.error:.1e}" if outcome.tokens_equal else "TOKENS DIFFER"


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("families", nargs="*")
    parser.add_argument("--tp-size", type=int, default=1, choices=(1, 2))
    asked = parser.parse_args()
    sys.exit(main(asked.families or (DIVISIBLE if asked.tp_size > 1 else list(parity.FAMILIES)), asked.tp_size))
