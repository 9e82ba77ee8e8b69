"""Time to first token of a long prompt whose KV lies in files, beside computing it; a random 0.5B model, one server.

    python -m deploy.benchmarks.kv_tier [--prompt-tokens 4096] [--repeats 5] [--dtype bfloat16] [--layers 24]

The pool holds one prompt, so each evicts the one before. In turn: a new prompt (computed), one that was evicted (its
files are in the system's cache), one whose files were dropped from that cache (from the disk), and a prompt that is
still in the pool. Printed are medians, their ranges and ratios, and what it costs to keep KV: a prompt's time with the
tier and without.
"""

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path

from deploy.benchmarks import half_billion
from deploy.benchmarks.serve_vs_transformers import Server

BLOCK_TOKENS = 64


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt-tokens", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--layers", type=int, default=24)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        directory = Path(place)
        model = half_billion.build(directory / "model", options.dtype, options.layers)
        files = directory / "kv"
        pool = ("--max-total-tokens", str(options.prompt_tokens + 512))
        servers = {
            "without": Server(model, options.dtype, directory / "without.log", *pool),
            "with": Server(model, options.dtype, directory / "with.log", *pool, "--kv-cache-dir", str(files)),
        }
        try:
            report(measure(servers, files, options.prompt_tokens, options.repeats), options.prompt_tokens)
        finally:
            for server in servers.values():
                server.stop()


def measure(servers: dict[str, Server], files: Path, length: int, repeats: int) -> dict[str, list[float]]:
    """Seconds to the first token, by what was measured."""
    draw = random.Random(0)
    found: dict[str, list[float]] = {}
    for name in servers:
        first_token(servers[name], prompt(draw, length))
    for number in range(repeats):
        prompts = [prompt(draw, length) for _ in range(3)]
        found.setdefault("computed, no tier", []).append(first_token(servers["without"], prompts[0]))
        for ids in prompts:  # each evicts the one before
            found.setdefault("computed", []).append(first_token(servers["with"], ids))
            await_files(files, (number * 3 + prompts.index(ids) + 2) * (length // BLOCK_TOKENS))
        found.setdefault("from files", []).append(first_token(servers["with"], prompts[0]))
        drop_from_cache(files)
        found.setdefault("from the disk", []).append(first_token(servers["with"], prompts[1]))
        found.setdefault("in the pool", []).append(first_token(servers["with"], prompts[1]))
    return found


def prompt(draw: random.Random, length: int) -> list[int]:
    return [draw.randrange(1, half_billion.VOCAB) for _ in range(length)]


def first_token(server: Server, ids: list[int]) -> float:
    return server.stream(ids, 1, 0.0).first_token_s


def await_files(files: Path, count: int) -> None:
    """Until as many blocks are in files."""
    deadline = time.monotonic() + 60
    while len(list(files.glob("*/*.kv"))) < count:
        if time.monotonic() > deadline:
            raise SystemExit(f"{len(list(files.glob('*/*.kv')))} blocks were written, not {count}")
        time.sleep(0.01)


def drop_from_cache(files: Path) -> None:
    """Have the system forget what it keeps of the files in memory."""
    for file in files.glob("*/*.kv"):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def report(found: dict[str, list[float]], length: int) -> None:
    """Print medians and ratios."""
    print(f"Time to first token of {length} tokens, seconds: median (least to most)")
    medians = {name: statistics.median(times) for name, times in found.items()}
    for name, times in found.items():
        ratio = medians["computed"] / medians[name]
        print(f"  {name:18} {medians[name]:7.3f} ({min(times):.3f} to {max(times):.3f})   {ratio:6.2f} x")
    cost = medians["computed"] / medians["computed, no tier"] - 1
    print(f"Keeping KV makes a prompt {100 * cost:+.1f} % slower.")


if __name__ == "__main__":
    main()
