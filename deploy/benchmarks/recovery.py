"""Processes that are killed under load: what clients notice.

    python -m deploy.benchmarks.recovery [--streams 32] [--kills 5] [--model demo]

For each role of the ring: streams run, one process is killed by SIGKILL, and again, until all were killed so often. The
answers are compared with those of the same requests on a server that nothing happened to. Printed are the time from
each kill to the next token of any stream, the largest gap in a stream, and how many answers differ.
"""

import argparse
import asyncio
import itertools
import json
import os
import signal
import statistics
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from deploy.benchmarks.serve_vs_transformers import Server

ROLES = ("scheduler", "detokenizer", "tokenizer")
BETWEEN_S = 7.0  # kills; a process stands by for the next scheduler three seconds after this one serves
PLACES = ("France", "Japan", "Kenya", "Peru", "Norway", "Egypt", "Chile", "Nepal")


@dataclass
class Answer:
    """What one streamed request gave, and when."""

    ids: list[int] = field(default_factory=list)
    text: str = ""
    arrivals: list[float] = field(default_factory=list)


async def streamed(port: int, number: int, new_tokens: int) -> Answer:
    """One greedy request."""
    params = {"temperature": 0, "max_new_tokens": new_tokens, "ignore_eos": True}
    body = {"text": f"{number}: the capital of {PLACES[number % len(PLACES)]}", "sampling_params": params}
    data = json.dumps({**body, "stream": True}).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
    head = "POST /generate HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    writer.write(f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data)
    answer = Answer()
    if b" 200 " not in (status := await reader.readline()):
        raise SystemExit(f"{status.decode()}{(await reader.read()).decode()}")
    async for line in reader:
        if line.startswith(b"data: {"):
            chunk: dict[str, Any] = json.loads(line[6:])
            answer.arrivals.append(time.perf_counter())
            answer.ids += chunk["output_ids"]
            answer.text += chunk["text"]
    writer.close()
    return answer


async def load(port: int, streams: int, new_tokens: int) -> list[Answer]:
    return await asyncio.gather(*(streamed(port, number, new_tokens) for number in range(streams)))


def process_of(launcher: int, role: str) -> psutil.Process:
    children = psutil.Process(launcher).children()
    return next(child for child in children if child.cmdline()[:1] == [f"quartet::{role}"])


async def under_kills(server: Server, role: str, args: argparse.Namespace) -> tuple[list[Answer], list[float]]:
    """The answers, and when the process was killed."""
    running = asyncio.create_task(load(server.port, args.streams, args.new_tokens))
    kills: list[float] = []
    await asyncio.sleep(1.0)
    while not running.done() and len(kills) < args.kills:
        kills.append(time.perf_counter())
        os.kill(process_of(server.process.pid, role).pid, signal.SIGKILL)
        await asyncio.wait([running], timeout=BETWEEN_S)
    return await running, kills


def report(role: str, answers: list[Answer], expected: list[Answer], kills: list[float]) -> int:
    """Print a row; returns how many answers differ."""
    arrivals = sorted(arrival for answer in answers for arrival in answer.arrivals)
    stalls = [next((at for at in arrivals if at > kill + 0.02), kill) - kill for kill in kills]
    gap = max(after - before for answer in answers for before, after in itertools.pairwise(answer.arrivals))
    differ = sum((a.ids, a.text) != (b.ids, b.text) for a, b in zip(answers, expected, strict=True))
    print(
        f"{role:>12}  {len(kills)} kills  {len(answers)} streams, {differ} differ  next token after "
        f"{statistics.median(stalls) * 1e3:.0f} ms (median), {max(stalls) * 1e3:.0f} ms (longest)  "
        f"largest gap in a stream {gap * 1e3:.0f} ms",
        flush=True,
    )
    return differ


def main() -> None:
    parser = argparse.ArgumentParser(description="Kill processes under load.")
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--new-tokens", type=int, default=1500)
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--dtype", default="float32")
    args = parser.parse_args()
    flags = ("--incremental-streaming-output", "--max-restarts", "100")
    differ = 0
    with tempfile.TemporaryDirectory() as place:
        server = Server(args.model, args.dtype, Path(place) / "log", *flags)
        try:
            expected = asyncio.run(load(server.port, args.streams, args.new_tokens))
            for role in ROLES:
                answers, kills = asyncio.run(under_kills(server, role, args))
                differ += report(role, answers, expected, kills)
        finally:
            server.stop()
    raise SystemExit(differ > 0)


if __name__ == "__main__":
    main()
