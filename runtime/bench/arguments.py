"""The arguments of `quartet bench`. Nothing slow is imported here, for --help and completion."""

import argparse
import math
import secrets
from typing import Any

from quartet.runtime.client.arguments import KEY_HELP, parsed, parser_of
from quartet.runtime.errors import UsageError

BENCH = """Put load on a running server and measure what clients see. Tokens are counted as the server reports them;
times are those at which the parts of an answer arrive here.

    quartet bench --url http://127.0.0.1:30000 --concurrency 8
    quartet bench --rate 2 --requests 200 --workload shared-prefix --slo ttft=0.5,tpot=0.05 --json result.json
    quartet bench --compare http://a:30000 http://b:30000 --api openai"""

APIS = ("native", "openai", "openai-chat")
WORKLOADS = ("random", "shared-prefix", "sharegpt", "multi-turn")
MOST_SEEDS = 1_000_000
SLO_NAMES = ("ttft", "tpot", "e2e")

PEERS = {  # flags of other load generators, and ours
    "--num-prompts": "--requests",
    "--num-prompt": "--requests",
    "--request-rate": "--rate",
    "--max-concurrency": "--concurrency",
    "--random-input-len": "--input-len",
    "--random-input": "--input-len",
    "--random-output-len": "--output-len",
    "--random-output": "--output-len",
    "--random-range-ratio": "--length-spread",
    "--sharegpt-output-len": "--output-len",
    "--random-prefix-len": "--prefix-len",
    "--gsp-num-groups": "--prefixes",
    "--gsp-system-prompt-len": "--prefix-len",
    "--gsp-question-len": "--input-len",
    "--gsp-output-len": "--output-len",
    "--base-url": "--url",
    "--host": "--url",
    "--port": "--url",
    "--backend": "--api",
    "--endpoint-type": "--api",
    "--endpoint": "--api",
    "--dataset-name": "--workload",
    "--dataset-path": "--file",
    "--output-file": "--json",
    "--save-result": "--json",
    "--result-filename": "--json",
    "--goodput": "--slo",
    "--warmup-requests": "--warmup",
    "--num-warmups": "--warmup",
    "--disable-ignore-eos": "--no-ignore-eos",
}


def bench_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet bench`."""
    parser = parser_of("bench", BENCH)
    server = parser.add_argument_group("server")
    server.add_argument("--url", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    server.add_argument("--compare", nargs=2, metavar=("URL1", "URL2"), help="measure two servers in turn: 1 2 2 1")
    server.add_argument("--api", choices=APIS, default="native", help="(default: %(default)s)")
    server.add_argument("--model", help="(default: the first that the server lists)")
    server.add_argument("--api-key", help=KEY_HELP)
    load = parser.add_argument_group("load")
    load.add_argument("--requests", type=count, default=64, help="sessions in multi-turn (default: %(default)s)")
    load.add_argument("--concurrency", type=count, help="requests at once (default: 8 without --rate)")
    load.add_argument("--rate", type=positive, help="requests a second, at random moments (Poisson)")
    load.add_argument("--warmup", type=natural, default=2, help="requests first, not counted (default: %(default)s)")
    load.add_argument(
        "--seed", type=natural, help="of prompts and moments (default: a new one, so no cache knows them)"
    )
    load.add_argument("--timeout", type=positive, default=600.0, help="seconds for a request (default: %(default)s)")
    work = parser.add_argument_group("workload")
    work.add_argument("--workload", choices=WORKLOADS, help="(default: random; with --file: sharegpt)")
    work.add_argument(
        "--input-len", type=count, default=128, help="tokens a prompt; words in openai-chat (%(default)s)"
    )
    work.add_argument("--output-len", type=count, help="tokens an answer (default: 64; the file's own in sharegpt)")
    work.add_argument(
        "--length-spread", type=share, default=0.0, help="lengths vary by this share, 0 to 1 (%(default)s)"
    )
    work.add_argument("--prefix-len", type=count, default=512, help="tokens a shared prefix (default: %(default)s)")
    work.add_argument("--prefixes", type=count, default=4, help="how many prefixes there are (default: %(default)s)")
    work.add_argument("--turns", type=count, help="of a session (default: 4 in multi-turn, 1 in sharegpt)")
    work.add_argument("--file", help="JSON with conversations, in ShareGPT's shape or with role and content")
    work.add_argument("--vocab-size", type=count, help="random ids are below it (default: the server's)")
    work.add_argument("--temperature", type=natural_number, default=0.0, help="(default: %(default)s)")
    work.add_argument("--no-ignore-eos", action="store_true", help="let answers end before --output-len")
    result = parser.add_argument_group("result")
    result.add_argument(
        "--slo", type=slo, default={}, help="what good requests keep, in seconds: ttft=0.5,tpot=0.05,e2e=9"
    )
    result.add_argument("--json", metavar="FILE", help="write the figures and each request; - prints them")
    result.add_argument("--plot", metavar="FILE.png", help="draw distributions and throughput (quartet-serve[plot])")
    return parser


def parse(words: list[str]) -> argparse.Namespace:
    """The options with their defaults by workload. Raises UsageError."""
    options = parsed(bench_parser(), words, {flag: f"it is called {ours} here" for flag, ours in PEERS.items()})
    options.workload = options.workload or ("sharegpt" if options.file else "random")
    if options.workload == "sharegpt" and not options.file:
        raise UsageError("--workload sharegpt needs --file, a JSON file with conversations")
    if options.file and options.workload != "sharegpt":
        raise UsageError(f"--file goes with --workload sharegpt, not {options.workload}")
    if options.turns and options.workload not in ("sharegpt", "multi-turn"):
        raise UsageError(f"--turns goes with --workload multi-turn or sharegpt, not {options.workload}")
    options.turns = options.turns or (4 if options.workload == "multi-turn" else 1)
    if options.rate is None and options.concurrency is None:
        options.concurrency = 8
    if options.seed is None:
        options.seed = secrets.randbelow(MOST_SEEDS)
    return options


def number(text: str, least: float, *, above: bool, kind: type = float) -> Any:
    """A number of at least (or above) a bound. Raises what argparse makes an error of."""
    try:
        value = kind(text)
    except ValueError:
        value = math.nan
    if not (value > least if above else value >= least):
        wanted = "integer" if kind is int else "number"
        raise argparse.ArgumentTypeError(
            f"takes {'an' if kind is int else 'a'} {wanted} {'above' if above else 'from'} {least:g}, not {text!r}"
        )
    return value


def count(text: str) -> int:
    return int(number(text, 0, above=True, kind=int))


def natural(text: str) -> int:
    return int(number(text, 0, above=False, kind=int))


def positive(text: str) -> float:
    return float(number(text, 0, above=True))


def natural_number(text: str) -> float:
    return float(number(text, 0, above=False))


def share(text: str) -> float:
    value = float(number(text, 0, above=False))
    if value > 1:
        raise argparse.ArgumentTypeError(f"takes a number from 0 to 1, not {text!r}")
    return value


def slo(text: str) -> dict[str, float]:
    """`ttft=0.5,tpot=0.05` as limits in seconds."""
    limits = {}
    for part in text.split(","):
        name, equals, value = part.partition("=")
        if name.strip() not in SLO_NAMES or not equals:
            raise argparse.ArgumentTypeError(f"takes {'=SECONDS, '.join(SLO_NAMES)}=SECONDS, not {part!r}")
        limits[name.strip()] = positive(value)
    return limits
