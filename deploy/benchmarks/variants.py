"""Quartet with several sets of flags at once: short single streams go to the servers in turns; prints ratios.

    python -m deploy.benchmarks.variants [--model DIR|FILE.gguf|half-billion] [--rounds 40] [--tokens 60] \\
        "bf16:" "int8:--quantization int8" "int4:--quantization int4" [--out result.json]

A single stream follows the speed of memory, and machines that others share change it within seconds. Servers that are
measured one after the other (peers.py) may meet different machines. Here all run from the beginning to the end, one of
them computes at a time, and a ratio is one of a round: of streams that follow one another within seconds. The first set
of flags is what the others are compared with. All models have to fit in memory together.
"""

import argparse
import json
import shlex
import statistics
import sys
import tempfile
from contextlib import ExitStack
from pathlib import Path

from deploy.benchmarks import half_billion
from deploy.benchmarks.peers import NATIVE, Load, Peer, measure, serving
from deploy.benchmarks.serve_vs_transformers import machine
from deploy.benchmarks.structured_output import HALF_BILLION

PROMPT_TOKENS, POOL_TOKENS, WARM_UP_TOKENS = 128, 16_384, 16


def server(model: Path, variant: str) -> Peer:
    """Quartet with the flags of a variant, NAME:FLAGS."""
    name, _, flags = variant.partition(":")
    start = shlex.join([sys.executable, "-m", "quartet.launch_server", "--model-path", str(model)])
    command = f"{start} --port {{port}} --log-level warning --max-total-tokens {POOL_TOKENS} {flags}"
    return Peer(name, command, NATIVE, "", {"HF_HUB_OFFLINE": "1"})


def compared(milliseconds: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """By variant: its median in ms a token, and how many times as fast as the first one it is, by rounds.

    `ratio` is the median of all rounds; `ratio where memory is quick` that of the half in which the first one was
    fastest.
    """
    base = next(iter(milliseconds.values()))
    quick = sorted(range(len(base)), key=base.__getitem__)[: (len(base) + 1) // 2]
    found = {}
    for name, own in milliseconds.items():
        ratios = [first / other for first, other in zip(base, own, strict=True)]
        found[name] = {
            "ms a token": statistics.median(own),
            "ratio": statistics.median(ratios),
            "ratio where memory is quick": statistics.median(ratios[i] for i in quick),
        }
    return found


def parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("variants", nargs="+", metavar="NAME:FLAGS")
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--tokens", type=int, default=60, help="of a stream")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args(arguments)
    names = [variant.partition(":")[0] for variant in given.variants]
    if len(set(names)) < len(names) or not all(names):
        parser.error("each variant needs a name of its own, as in int8:--quantization int8")
    if given.rounds < 1 or given.tokens < 2:
        parser.error("--rounds is at least 1, --tokens at least 2")
    return given


def main(arguments: list[str] | None = None) -> int:
    given = parsed(arguments)
    model = half_billion.build(HALF_BILLION, "bfloat16") if given.model == "half-billion" else Path(given.model)
    peers = [server(model, variant) for variant in given.variants]
    warm_up = Load("warm-up", 1, PROMPT_TOKENS, 0, WARM_UP_TOKENS, "decode tok/s")
    stream = Load("single stream", 1, PROMPT_TOKENS, 0, given.tokens, "decode tok/s")
    before = machine()
    milliseconds: dict[str, list[float]] = {peer.name: [] for peer in peers}
    with ExitStack() as stack, tempfile.TemporaryDirectory() as logs:
        ports = [stack.enter_context(serving(peer, Path(logs) / f"{i}.log"))[0] for i, peer in enumerate(peers)]
        for port in ports:
            measure(port, NATIVE, warm_up, 0)
        for round in range(given.rounds):
            for peer, port in zip(peers, ports, strict=True):
                milliseconds[peer.name].append(1e3 / measure(port, NATIVE, stream, round)["decode tok/s"])
    found = compared(milliseconds)
    print(json.dumps(before))
    for name, figures in found.items():
        print(f"{name:16}" + "".join(f"  {figure} {value:.2f}" for figure, value in figures.items()))
    if given.out:
        result = {"machine": before, "variants": given.variants, "figures": found, "all": milliseconds}
        given.out.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
