"""What drafts give where text repeats, what they cost where it does not, and what a step costs that verifies some.

    python -m deploy.benchmarks.speculation [--model DIR|half-billion] [--tokens 96] [--rounds 7]

One stream on a random model of Qwen2.5-0.5B's shape in bfloat16, planner and worker in this process, with and without
--speculative-algorithm NGRAM on the same weights. The runs alternate, and ratios are medians over neighbouring ones, so
that a busy machine disturbs less; CPU time for a token is disturbed least. The model means nothing by what it says, but
left to itself it soon repeats itself.
"""

import argparse
import random
import statistics
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from deploy.benchmarks import half_billion
from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.worker import Worker
from tests.engine import Engine

HALF_BILLION = Path("/tmp/quartet-half-billion")
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "max_total_tokens": 8192}
PROMPT_LEN = 200
ROWS = (1, 2, 3, 5, 9, 17, 33, 64)
STEPS = 15

TWENTY = {str(token): 1000.0 for token in range(7, 27)}

Prompt = Callable[[random.Random], list[int]]


def scattered(draw: random.Random) -> list[int]:
    return [draw.randrange(1000, 100_000) for _ in range(PROMPT_LEN)]


def repeated(draw: random.Random) -> list[int]:
    return scattered(draw)[:20] * (PROMPT_LEN // 20)


TEXTS: dict[str, tuple[Prompt, dict[str, Any]]] = {
    "one token for ever: all drafts right": (scattered, {"temperature": 0.0, "logit_bias": {"7": 1000.0}}),
    "greedy, as the model repeats itself": (repeated, {"temperature": 0.0}),
    "drawn from all tokens: no run of them twice": (scattered, {"temperature": 1.0}),
    "drawn from 20: drafts there are, and wrong": (scattered, {"temperature": 2.0, "logit_bias": TWENTY}),
}


class Run(NamedTuple):
    """One stream, from its first token to its last."""

    tokens_per_s: float
    cpu_ms_per_token: float
    steps: int
    proposed: int
    correct: int


def run(engine: Engine, prompt: list[int], tokens: int, params: dict[str, Any]) -> Run:
    engine.planner.forget_prefixes()
    stats = engine.planner.stats
    proposed, correct = stats.proposed_drafts, stats.correct_drafts
    engine.add(prompt, SamplingParams(max_new_tokens=tokens, ignore_eos=True, **params), seed=1)
    while not any(sequence.output_len for sequence in engine.planner.running):
        engine.step()
    steps, begun, cpu_begun = engine.steps, time.perf_counter(), time.process_time()
    engine.run()
    seconds, cpu_s = time.perf_counter() - begun, time.process_time() - cpu_begun
    return Run(
        (tokens - 1) / seconds,
        cpu_s * 1e3 / (tokens - 1),
        engine.steps - steps,
        stats.proposed_drafts - proposed,
        stats.correct_drafts - correct,
    )


def compare(plain: Engine, drafting: Engine, tokens: int, rounds: int) -> None:
    print("text | tok/s without | with | ratio (least … most) | CPU for a token | tokens a step | drafts right")
    for name, (prompt, params) in TEXTS.items():
        pairs = []
        for i in range(rounds):
            ids = prompt(random.Random(i))
            pairs.append((run(plain, ids, tokens, params), run(drafting, ids, tokens, params)))
        ratios = [drafted.tokens_per_s / alone.tokens_per_s for alone, drafted in pairs]
        without, with_ = (statistics.median(runs[side].tokens_per_s for runs in pairs) for side in (0, 1))
        cpu = statistics.median(drafted.cpu_ms_per_token / alone.cpu_ms_per_token for alone, drafted in pairs)
        length = statistics.median((tokens - 1) / drafted.steps for _, drafted in pairs)
        proposed, correct = (sum(getattr(drafted, name) for _, drafted in pairs) for name in ("proposed", "correct"))
        print(
            f"{name} | {without:.1f} | {with_:.1f} | {statistics.median(ratios):.2f} ({min(ratios):.2f} … "
            f"{max(ratios):.2f}) | {cpu:.2f} | {length:.2f} | {correct} of {proposed}",
            flush=True,
        )


def verification_ms(worker: Worker) -> dict[int, list[float]]:
    """Times of a step of one request by the tokens that it computes, the sizes taking turns."""
    ids = array("i", scattered(random.Random(0)))
    pages = list(range(1, 1 + -(-(PROMPT_LEN + max(ROWS)) // worker.page_size)))
    sequence = Sequence(Request(rid="r", params=SamplingParams(temperature=0.0)), ids, PROMPT_LEN, pages=pages)
    start = PROMPT_LEN - 1
    worker.collect(worker.launch(Plan([Slice(sequence, 0, start, False)])))
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(STEPS):
        for rows in ROWS:
            share = Slice(sequence, start, start + rows, True, drafts=(7,) * (rows - 1))
            plan = Plan([share], decodes=int(rows == 1), verifications=int(rows > 1))
            begun = time.perf_counter()
            worker.collect(worker.launch(plan))
            times[rows].append((time.perf_counter() - begun) * 1e3)
    worker.forget(sequence)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="half-billion")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    is_path = args.model != "half-billion"
    directory = Path(args.model) if is_path else half_billion.build(HALF_BILLION, "bfloat16")
    plain = Engine(directory, **SETTINGS)
    drafting = Engine(directory, worker=plain.worker, speculative_algorithm="NGRAM", **SETTINGS)
    run(plain, scattered(random.Random(0)), 8, {})
    compare(plain, drafting, args.tokens, args.rounds)
    times = verification_ms(plain.worker)
    print("tokens computed in a step | median ms | median of the ratios to one token")
    for rows, own in times.items():
        ratio = statistics.median(ours / one for ours, one in zip(own, times[1], strict=True))
        print(f"{rows:3} | {statistics.median(own):.1f} | {ratio:.2f}")


if __name__ == "__main__":
    main()
