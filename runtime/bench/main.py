"""`quartet bench`: put load on a server, or on two in turn, and print what clients saw."""

import argparse
import asyncio
import math
import os
import signal
import sys
from collections.abc import Callable, Coroutine, Sequence
from pathlib import Path
from typing import NamedTuple

import httpx
import msgspec

from quartet.runtime.bench import plot, workload
from quartet.runtime.bench.apis import Settings, api_named
from quartet.runtime.bench.arguments import parse
from quartet.runtime.bench.load import Sender, by_concurrency, by_rate
from quartet.runtime.bench.records import Record, Run, Session
from quartet.runtime.bench.report import comparison, table
from quartet.runtime.bench.statistics import Summary, ratios, summarize
from quartet.runtime.client.arguments import KEY_VARIABLE
from quartet.runtime.client.connection import ClientError, base_url, client_options, connect, served_models
from quartet.runtime.errors import UsageError
from quartet.runtime.log import plain, put, say

INTERRUPTED = 130
PROBE_S = 30.0
WARMUP_SEED = 1_000_003  # added to the seed, so that no prefix of the run is cached by it
RUN_SEED = 7_919  # added for each further run on the same server, likewise


class Target(NamedTuple):
    """A server, and what is sent to it."""

    url: str
    model: str
    vocabulary: int


class ServerInfo(msgspec.Struct):
    """What /get_server_info says of ids; other servers do not have it."""

    vocab_size: int | None = None


def main(argv: Sequence[str]) -> int:
    """Measure and print; returns the exit status: 1 if nothing completed."""
    try:
        options = parse(list(argv))
        options.api_key = options.api_key or os.environ.get(KEY_VARIABLE)
        if options.plot:
            plot.check()
        if options.json not in (None, "-") and not Path(options.json).absolute().parent.is_dir():
            raise UsageError(f"there is no directory for --json {options.json}")
        return compare(options) if options.compare else measure(options)
    except UsageError as error:
        return fail(2, error)
    except ClientError as error:
        return fail(1, error)


def fail(status: int, error: Exception) -> int:
    say(f"quartet: {plain(str(error))}", sys.stderr)
    return status


def measure(options: argparse.Namespace) -> int:
    """One server."""
    target = find(options.url, options)
    run = execute(target, options, options.seed)
    summary = summarize([run.records], options.slo, run.interrupted)
    title = f"{target.url} serves {target.model}: {load_in_words(options)}"
    found = {"url": target.url, "model": target.model, "summary": summary, "runs": [run]}
    try:
        show([title, *table(summary)], options)
    finally:  # whoever reads the table may have left
        write({**described(options), **found}, options)
        if options.plot:
            plot.draw({target.url: run.records}, Path(options.plot))
    return status_of(summary)


def compare(options: argparse.Namespace) -> int:
    """Two servers, in turn: first, second, second, first. What both see is the same, and no run repeats another's."""
    targets = [find(url, options) for url in options.compare]
    runs: tuple[list[Run], list[Run]] = ([], [])
    for which, round_ in ((0, 0), (1, 0), (1, 1), (0, 1)):
        run = execute(targets[which], options, options.seed + RUN_SEED * round_)
        runs[which].append(run)
        if run.interrupted:
            break
    first, second = (
        summarize([run.records for run in side], options.slo, any(run.interrupted for run in side)) for side in runs
    )
    names = (targets[0].url, targets[1].url)
    show([f"{load_in_words(options)}, in turn", *comparison(first, second, names)], options)
    found = {"first": first, "second": second, "ratios": ratios(first, second), "runs": [*runs[0], *runs[1]]}
    write({**described(options), "urls": names, **found}, options)
    if options.plot:
        labels = names if names[0] != names[1] else (f"{names[0]} (first)", f"{names[1]} (second)")
        plot.draw(
            {label: side[0].records for label, side in zip(labels, runs, strict=True) if side}, Path(options.plot)
        )
    return max(status_of(first), status_of(second))


def status_of(summary: Summary) -> int:
    if summary.interrupted:
        return INTERRUPTED
    return int(summary.completed == 0)


# preparation


def find(address: str, options: argparse.Namespace) -> Target:
    """The server at an address and its model. Raises UsageError, ClientError."""
    url = base_url(address)
    with connect(url, options.api_key, PROBE_S) as client:
        models = served_models(client)
        if not models:
            raise ClientError(f"the server at {url} has no model")
        if options.model and options.model not in models:
            raise ClientError(f"the server at {url} has no model {options.model}; it has {', '.join(models)}")
        vocabulary = options.vocab_size or vocabulary_of(client) or workload.Lengths().vocabulary
        return Target(url, options.model or models[0], vocabulary)


def vocabulary_of(client: httpx.Client) -> int | None:
    try:
        answer = client.get("/get_server_info")
        return msgspec.json.decode(answer.content, type=ServerInfo).vocab_size if answer.status_code == 200 else None
    except (httpx.HTTPError, msgspec.DecodeError, UnicodeDecodeError):
        return None


def sessions_of(target: Target, options: argparse.Namespace, count: int, seed: int) -> list[Session]:
    """So many sessions of the workload that the options describe. Raises UsageError."""
    lengths = workload.Lengths(
        input=options.input_len,
        output=options.output_len,
        spread=options.length_spread,
        prefix=options.prefix_len,
        prefixes=options.prefixes,
        turns=options.turns,
        vocabulary=target.vocabulary,
    )
    return workload.make(options.workload, count, lengths, seed, Path(options.file) if options.file else None)


# one run


def execute(target: Target, options: argparse.Namespace, seed: int) -> Run:
    """Warm the server up and measure it once. Ctrl-C ends it; what has ended by then counts."""
    warmup = sessions_of(target, options, options.warmup, seed + WARMUP_SEED)
    sessions = sessions_of(target, options, options.requests, seed)
    run = Run(target.url)
    note = Progress(target.url, sum(map(len, sessions)), run.records)
    asyncio.run(interruptible(run, put_load(target, options, seed, warmup, sessions, note)))
    note.end()
    return run


async def interruptible(run: Run, work: Coroutine[None, None, None]) -> None:
    """Await the work; at Ctrl-C cancel it and say so in the run."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGINT, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        run.interrupted = True


async def put_load(
    target: Target,
    options: argparse.Namespace,
    seed: int,
    warmup: list[Session],
    sessions: list[Session],
    note: Callable[[Record], None],
) -> None:
    """The requests that are not counted, then those that are."""
    settings = Settings(target.model, options.temperature, not options.no_ignore_eos)
    many = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    async with httpx.AsyncClient(**client_options(target.url, options.api_key, None), limits=many) as client:  # type: ignore[arg-type]
        send = Sender(client, api_named(options.api, options.turns), settings, options.timeout)
        await by_concurrency(warmup, send, lambda record: None, options.concurrency or 1)
        if options.rate is None:
            await by_concurrency(sessions, send, note, options.concurrency)
        else:
            times = workload.start_times(len(sessions), options.rate, seed)
            await by_rate(sessions, send, note, times, options.concurrency)


class Progress:
    """Keeps the records of a run and shows how many there are, where a person sees it."""

    def __init__(self, url: str, expected: int, records: list[Record]) -> None:
        self._url = url
        self._expected = expected
        self._records = records
        self._failed = 0
        self._shows = sys.stderr.isatty()

    def __call__(self, record: Record) -> None:
        self._records.append(record)
        self._failed += bool(record.error)
        if self._shows:
            failed = f", {self._failed} failed" if self._failed else ""
            print(
                f"\r\x1b[K{self._url}: {len(self._records)}/{self._expected}{failed}",
                end="",
                file=sys.stderr,
                flush=True,
            )

    def end(self) -> None:
        if self._shows:
            print("\r\x1b[K", end="", file=sys.stderr, flush=True)


# results


def load_in_words(options: argparse.Namespace) -> str:
    """What the load is, in one line."""
    lengths = (
        ""
        if options.workload == "sharegpt"
        else f", {options.input_len} in, {options.output_len or workload.DEFAULT_OUTPUT} out"
    )
    prefix = f", {options.prefixes} prefixes of {options.prefix_len}" if options.workload == "shared-prefix" else ""
    turns = f", {options.turns} turns" if options.turns > 1 else ""
    pace = f"{options.concurrency} at once"
    if options.rate:
        pace = "all at once" if math.isinf(options.rate) else f"{options.rate:g} requests/s"
    return f"{options.api}, {options.workload}{lengths}{prefix}{turns}, {pace}, seed {options.seed}"


def described(options: argparse.Namespace) -> dict[str, object]:
    """The options of a run, but for the key."""
    return {"options": {name: value for name, value in vars(options).items() if name != "api_key"}}


def show(lines: list[str], options: argparse.Namespace) -> None:
    """Print the table; to stderr where JSON goes to stdout."""
    text = "\n".join(lines)
    if options.json == "-":
        say(text, sys.stderr)
    else:
        put(text)


def write(result: dict[str, object], options: argparse.Namespace) -> None:
    """The result as JSON, where it was asked for. Raises UsageError."""
    if options.json is None:
        return
    text = msgspec.json.format(msgspec.json.encode(result), indent=2).decode()
    if options.json == "-":
        print(text)
        return
    try:
        Path(options.json).write_text(text + "\n")
    except OSError as error:
        raise UsageError(f"cannot write --json {options.json}: {error.strerror}") from error
