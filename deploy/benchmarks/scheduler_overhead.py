"""What the scheduler itself costs: full steps with a worker that computes nothing.

    python deploy/benchmarks/scheduler_overhead.py [--running 256] [--steps 300] [--page-size 16] [--depth 0]

Prints the time of a decode step (decide, launch, commit, build and encode the frame) for a batch that is full, and of
a prefix match against a tree that holds the prompt.
"""

import argparse
import statistics
import sys
import time
from array import array
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from quartet.runtime.messages import Message, Request, Tokenized, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import encode
from quartet.scheduler_service.core.plan import Plan, Result
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.prefix_tree import PrefixTree
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.scheduler import Scheduler

GOAL_MS = 2.0
PROMPT_LEN = 100
WALK_TOKENS = 32_768


class NullWorker:
    """Gives token 7 for every slice that samples."""

    weight_version = "null"

    def launch(self, plan: Plan) -> Plan:
        return plan

    def collect(self, pending: Plan) -> list[Result]:
        return [Result(tokens=[7] if part.samples else None) for part in pending.slices]

    def forget(self, sequence: Sequence) -> None:
        pass

    def reset(self) -> None:
        pass


class Source:
    """An inbox that gives all requests at once, then nothing."""

    def __init__(self, messages: list[Message]) -> None:
        self.messages = messages

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        messages, self.messages = self.messages, []
        return messages


class Sink:
    """An outbox that encodes frames and counts their bytes."""

    sent = 0

    def send(self, messages: Any) -> None:
        self.sent += len(encode(messages))


class NoProgress:
    def beat(self, busy: bool) -> None:
        pass


def full_batch(running: int, steps: int, page_size: int, depth: int) -> Scheduler:
    """A scheduler whose batch is full and has been prefilled."""
    config = PlannerConfig(
        page_size=page_size,
        total_pages=2 * running * (PROMPT_LEN + 2 * steps) // page_size,
        max_running=running,
        context_length=1 << 20,
        vocab_size=1 << 16,
    )
    params = SamplingParams(max_new_tokens=2 * steps, ignore_eos=True)
    prompts = [pack_ids([i + 10, *range(1000, 1000 + PROMPT_LEN - 1)]) for i in range(running)]
    requests: list[Message] = [
        Tokenized(request=Request(rid=f"{i:032x}", params=params), prompt_ids=ids) for i, ids in enumerate(prompts)
    ]
    scheduler = Scheduler(Planner(config), NullWorker(), Source(requests), Sink(), NoProgress(), depth=depth)
    while any(s.needs_prefill for s in scheduler.planner.running) or len(scheduler.planner.running) < running:
        scheduler.step()
    return scheduler


def decode_steps_ms(scheduler: Scheduler, steps: int) -> list[float]:
    times = []
    for _ in range(steps):
        start = time.perf_counter()
        scheduler.step()
        times.append((time.perf_counter() - start) * 1e3)
    return times


def prefix_walk_ms(page_size: int) -> float:
    """Median time to match a prompt that the tree holds, cut into pieces as chunked prefill leaves them."""
    tree = PrefixTree(page_size)
    tokens = array("i", range(WALK_TOKENS)).tobytes()
    pages = list(range(WALK_TOKENS // page_size))
    for end in range(512, WALK_TOKENS + 1, 512):
        tree.insert(b"", tokens[: end * 4], pages[: end // page_size])
    times = []
    for _ in range(50):
        start = time.perf_counter()
        node = tree.match(b"", tokens)
        assert len(tree.path_pages(node)) == len(pages)
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--running", type=int, default=256)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--page-size", type=int, nargs="*", default=[1, 16])
    parser.add_argument("--depth", type=int, nargs="*", default=[0, 1])
    args = parser.parse_args()
    print("page size | depth | median ms | p99 ms | us per request")
    for page_size in args.page_size:
        for depth in args.depth:
            times = decode_steps_ms(full_batch(args.running, args.steps, page_size, depth), args.steps)
            median, p99 = statistics.median(times), statistics.quantiles(times, n=100)[98]
            per_request = median * 1e3 / args.running
            print(f"{page_size:9} | {depth:5} | {median:9.3f} | {p99:6.3f} | {per_request:.2f}")
    for page_size in args.page_size:
        print(f"prefix match of {WALK_TOKENS} tokens, page size {page_size}: {prefix_walk_ms(page_size):.3f} ms")
    print(f"goal: a step of 256 requests in at most {GOAL_MS} ms")


if __name__ == "__main__":
    main()
