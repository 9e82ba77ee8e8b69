"""Mixed requests for a long time: what the memory of every process does.

    python -m deploy.benchmarks.soak [--minutes 35] [--warmup-minutes 10] [--clients 4] [--model demo] [--strict]

Requests differ in length, streaming, sampling, logprobs and grammars; some clients leave in the middle, and some
requests are refused. Printed are the resident memory of each process of the server over time, and after the warm-up its
slope per 100,000 requests by least squares. With --strict the exit status is 1 where a slope exceeds the aim, or where
a request got another answer than it should have.

The KV pool is small, so that it is full of cached prefixes when the warm-up ends: until then each request touches
memory that the pool has been given, and that is no leak.
"""

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.benchmarks.serve_vs_transformers import Server

AIM_MB = 1.0  # growth of one process in so many requests:
PER_REQUESTS = 100_000
MB = 1 << 20
WORDS = (
    "France",
    "Japan",
    "Kenya",
    "capital",
    "river",
    "story",
    "about",
    "tell",
    "me",
    "the",
    "a",
    "of",
    "once",
    "was",
)
HEAD_END = b"\r\n\r\n"
SERVER_FLAGS = ("--max-total-tokens", "16384", "--max-running-requests", "16")


@dataclass(frozen=True)
class Call:
    """One request, and what should come of it."""

    path: str
    body: dict[str, Any]
    status: int = 200
    leave_after: int = 0  # bytes of the answer after which the client goes; 0: it stays


def prompt(draw: random.Random, most_words: int) -> str:
    return " ".join(draw.choices(WORDS, k=draw.randint(1, most_words))) + f" {draw.randrange(10**6)}"


def sampling(draw: random.Random, **more: Any) -> dict[str, Any]:
    return {"max_new_tokens": draw.choice((1, 4, 16, 40)), "temperature": draw.choice((0, 0.8)), **more}


def plain(draw: random.Random) -> Call:
    return Call("/generate", {"text": prompt(draw, 30), "sampling_params": sampling(draw)})


def long_prompt(draw: random.Random) -> Call:
    return Call("/generate", {"text": prompt(draw, 900), "sampling_params": sampling(draw, ignore_eos=True)})


def streamed(draw: random.Random) -> Call:
    params = sampling(draw, ignore_eos=True, stop=[" the end", "\n\n"], top_p=0.9, top_k=40)
    return Call("/generate", {"text": prompt(draw, 60), "stream": True, "sampling_params": params})


def penalised(draw: random.Random) -> Call:
    params = sampling(draw, frequency_penalty=0.5, repetition_penalty=1.1, min_p=0.02, n=draw.randint(1, 3))
    return Call("/generate", {"text": prompt(draw, 30), "sampling_params": params})


def scored(draw: random.Random) -> Call:
    logprobs = {"return_logprob": True, "logprob_start_len": 0, "top_logprobs_num": draw.randint(0, 5)}
    return Call("/generate", {"text": prompt(draw, 100), "sampling_params": sampling(draw), **logprobs})


def batch(draw: random.Random) -> Call:
    texts = [prompt(draw, 20) for _ in range(draw.randint(2, 5))]
    return Call("/generate", {"text": texts, "sampling_params": sampling(draw)})


def chat(draw: random.Random) -> Call:
    messages = [{"role": "user", "content": prompt(draw, 40)}]
    return Call(
        "/v1/chat/completions",
        {"messages": messages, "stream": draw.random() < 0.5, "max_tokens": draw.choice((4, 24)), "temperature": 0.7},
    )


def constrained(draw: random.Random) -> Call:
    """Nearly every one with a grammar of its own."""
    name = f"key{draw.randrange(10**6)}"
    schema = {"type": "object", "properties": {name: {"type": "integer"}}, "required": [name]}
    grammar = draw.choice(({"json_schema": json.dumps(schema)}, {"regex": f"[a-z]{{1,9}} {draw.randrange(10**6)}"}))
    return Call("/generate", {"text": prompt(draw, 20), "sampling_params": {"max_new_tokens": 24, **grammar}})


def left(draw: random.Random) -> Call:
    """The client goes after a few chunks."""
    params = {"max_new_tokens": 400, "ignore_eos": True, "temperature": 0.8}
    body = {"text": prompt(draw, 30), "stream": True, "sampling_params": params}
    return Call("/generate", body, leave_after=draw.randint(1, 3000))


def refused(draw: random.Random) -> Call:
    return Call("/generate", {"text": prompt(draw, 10), "sampling_params": {"temperature": -1}}, status=400)


KINDS: dict[Callable[[random.Random], Call], int] = {  # with how often each comes
    plain: 6,
    long_prompt: 1,
    streamed: 3,
    penalised: 2,
    scored: 2,
    batch: 1,
    chat: 3,
    constrained: 2,
    left: 1,
    refused: 1,
}


@dataclass
class Sample:
    """Memory of each process, at a moment."""

    at_s: float
    requests: int
    resident: dict[str, int]  # process title → bytes
    descriptors: dict[str, int]


@dataclass
class Soak:
    """What was sent and what was seen."""

    port: int
    began: float = field(default_factory=time.monotonic)
    requests: int = 0
    wrong: Counter[str] = field(default_factory=Counter)
    samples: list[Sample] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        return time.monotonic() - self.began

    async def client(self, until_s: float, seed: int) -> None:
        """Send one request after the other."""
        numbers = random.Random(seed)
        kinds, weights = list(KINDS), list(KINDS.values())
        while self.elapsed_s < until_s:
            kind = numbers.choices(kinds, weights)[0]
            call = kind(random.Random(numbers.randrange(1 << 62)))
            try:
                if fault := await carry_out(self.port, call):
                    self.wrong[f"{kind.__name__}: {fault}"] += 1
            except OSError as error:
                self.wrong[f"{kind.__name__}: {error}"] += 1
                await asyncio.sleep(1)
            self.requests += 1

    async def watch(self, launcher: int, until_s: float, every_s: float) -> None:
        """Take and print a sample now and then."""
        while self.elapsed_s < until_s:
            await asyncio.sleep(min(every_s, max(0.1, until_s - self.elapsed_s)))
            resident, descriptors = look(launcher)
            sample = Sample(self.elapsed_s, self.requests, resident, descriptors)
            if not self.samples or self.samples[-1].resident.keys() != resident.keys():
                print("seconds requests  MB: " + "  ".join(short(title) for title in resident), flush=True)
            self.samples.append(sample)
            columns = (f"{size / MB:{max(len(short(title)), 6)}.1f}" for title, size in resident.items())
            print(f"{sample.at_s:7.0f} {sample.requests:8d}      " + "  ".join(columns), flush=True)


async def carry_out(port: int, call: Call) -> str:
    """Send a request and read its answer; returns what was wrong with it."""
    data = json.dumps(call.body).encode()
    head = f"POST {call.path} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nConnection: close\r\n"
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
        if call.leave_after:
            await reader.read(call.leave_after)
            return ""
        answer = await reader.read()
    finally:
        writer.close()
    status = answer[9:12].decode(errors="replace")
    if status != str(call.status):
        return f"{status} instead of {call.status}: {answer.partition(HEAD_END)[2][:200]!r}"
    if call.body.get("stream") and b"data: [DONE]" not in answer:
        return "the stream has no end"
    return ""


def look(launcher: int) -> tuple[dict[str, int], dict[str, int]]:
    """Resident bytes and descriptors of the launcher and all its descendants."""
    parent = psutil.Process(launcher)
    resident: dict[str, int] = {}
    descriptors: dict[str, int] = {}
    for process in (parent, *parent.children(recursive=True)):
        try:
            title = title_of(process)
            if title and title not in resident:  # a grammar is tried in a fork of the process that checks them
                resident[title], descriptors[title] = process.memory_info().rss, process.num_fds()
        except psutil.Error:  # it has ended meanwhile
            continue
    return dict(sorted(resident.items())), descriptors


def title_of(process: psutil.Process) -> str:
    """`quartet::scheduler`, or the script of a process that has no title; empty for one that ends."""
    words = process.cmdline()
    if words and words[0].startswith("quartet::"):
        return words[0]
    return next((Path(word).stem for word in words if word.endswith(".py")), str(process.name()) if words else "")


def short(title: str) -> str:
    return title.removeprefix("quartet::")


def slope(points: list[tuple[int, int]]) -> float:
    """MB per 100,000 requests, by least squares over (requests, bytes)."""
    requests, sizes = zip(*points, strict=True)
    return statistics.linear_regression(requests, sizes).slope * PER_REQUESTS / MB


def report(soak: Soak, warmup_s: float) -> bool:
    """Print the slopes; whether all of them, and all answers, are as they should be."""
    late = [sample for sample in soak.samples if sample.at_s >= warmup_s]
    titles = [title for title in late[-1].resident if all(title in sample.resident for sample in late)] if late else []
    good = bool(titles) and len(late) > 2
    print(f"\nafter the warm-up: {len(late)} samples, {late[-1].requests - late[0].requests if late else 0} requests")
    for title in titles if good else ():
        points = [(sample.requests, sample.resident[title]) for sample in late]
        found = slope(points)
        descriptors = [sample.descriptors[title] for sample in late]
        good = good and found <= AIM_MB
        print(
            f"  {short(title):>14}: {points[0][1] / MB:7.1f} → {points[-1][1] / MB:7.1f} MB, "
            f"{found:+8.2f} MB per {PER_REQUESTS} requests (aim: {AIM_MB:g}), "
            f"descriptors {min(descriptors)} to {max(descriptors)}"
        )
    for fault, count in soak.wrong.most_common():
        print(f"  {count} times {fault}")
    return good and not soak.wrong


async def run(port: int, launcher: int, args: argparse.Namespace) -> bool:
    soak, until_s = Soak(port), args.minutes * 60
    clients = [soak.client(until_s, args.seed * 1000 + number) for number in range(args.clients)]
    await asyncio.gather(soak.watch(launcher, until_s, args.sample_s), *clients)
    return report(soak, args.warmup_minutes * 60)


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch the memory of a server under mixed requests.")
    parser.add_argument("--minutes", type=float, default=35)
    parser.add_argument("--warmup-minutes", type=float, default=10)
    parser.add_argument("--clients", type=int, default=4)
    parser.add_argument("--sample-s", type=float, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--strict", action="store_true", help="exit status 1 where the aim is missed")
    args, server_flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as place:
        server = Server(args.model, args.dtype, Path(place) / "log", *SERVER_FLAGS, *server_flags)
        try:
            good = asyncio.run(run(server.port, server.process.pid, args))
        finally:
            server.stop()
    raise SystemExit(args.strict and not good)


if __name__ == "__main__":
    main()
