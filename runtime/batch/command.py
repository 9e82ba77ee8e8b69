"""`quartet run-batch`: a file of requests in, a file of answers out, by a server that runs or is started for it."""

import argparse
import asyncio
import contextlib
import os
import sys
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import httpx
import msgspec
from tqdm import tqdm

from quartet.runtime.api.server import Server
from quartet.runtime.batch import lines
from quartet.runtime.batch.arguments import run_batch_parser
from quartet.runtime.batch.results import Results
from quartet.runtime.batch.run import run_batch
from quartet.runtime.client.arguments import KEY_VARIABLE, parsed
from quartet.runtime.client.connection import base_url, client_options
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.limits import MAX_BATCH_ANSWER_BYTES
from quartet.runtime.log import plain, say
from quartet.runtime.settings import flags
from quartet.runtime.shorten import short

DONE, FAILED, USAGE = 0, 1, 2
OTHER_BATCH = "the output file has the result of another request, {!r}; name another file, or remove that one"
LINE_EVERY_S = 10.0  # of progress, where there is no terminal


class ServerLost(Exception):
    """The server does not answer any more; what is done is done."""


def main(words: Sequence[str]) -> int:
    """Run a batch to its end. The status is 1 where a request was not answered, or the server was lost."""
    try:
        return run(words)
    except UsageError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return USAGE
    except (StartupError, ServerLost, OSError) as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return FAILED


def run(words: Sequence[str]) -> int:
    """The same; raises what cannot go on."""
    cut = words.index("--") if "--" in words else len(words)
    options = parsed(run_batch_parser(), words[:cut])
    if options.concurrency < 1:
        raise UsageError(f"--concurrency must be at least 1, got {options.concurrency}")
    if not options.timeout > 0:
        raise UsageError(f"--timeout must be more than 0 seconds, got {options.timeout:g}")
    if options.url and (options.model or words[cut:]):
        raise UsageError("--url names a server that runs; a model and flags behind -- are for one that is started")
    source, target = Path(options.input), Path(options.output)
    if not source.is_file():
        raise UsageError(f"{source} is no file")
    if target.exists() and target.samefile(source):
        raise UsageError("the answers would be written into the file of the requests")
    if not target.absolute().parent.is_dir():
        raise UsageError(f"{target.absolute().parent} is no directory")
    server_flags = given_flags(words[cut + 1 :])
    with contextlib.closing(Results(target)) as results:
        total, left = compared(source, results)
        if left:
            with Progress(total, results) as progress, address(options, server_flags) as where:
                asyncio.run(answer(source, results, where, options, progress))
        say(summary(results, target), sys.stderr)
        return DONE if not results.failed else FAILED


def given_flags(words: Sequence[str]) -> dict[str, object]:
    """The flags behind `--` by name. Raises UsageError."""
    found = flags.load(words)
    return {name: getattr(found.config, name) for name in found.origins}


def compared(source: Path, results: Results) -> tuple[int, int]:
    """The lines of a batch, and those without a result. Raises UsageError where there are results of another batch."""
    total = left = 0
    others = set(results.custom_ids)
    with source.open("rb") as file:
        for line in lines.read(file):
            total += 1
            left += not results.has(line)
            others.discard(line.custom_id or "")
            if isinstance(line, lines.Request) and results.is_of_another(line):
                raise UsageError(OTHER_BATCH.format(short(line.custom_id)))
    if others:
        raise UsageError(OTHER_BATCH.format(short(min(others))))
    return total, left


@contextlib.contextmanager
def address(options: argparse.Namespace, server_flags: dict[str, object]) -> Iterator[httpx.AsyncHTTPTransport | str]:
    """Where the server is: a URL, or the socket of one that was started for this batch. Raises StartupError."""
    if options.url:
        yield base_url(options.url)
        return
    model = options.model or "demo"
    say(f"starting {model} ...", sys.stderr)
    with Server(model, server_flags, private=True) as server:
        yield httpx.AsyncHTTPTransport(uds=str(server.socket_path), limits=NO_LIMITS)


NO_LIMITS = httpx.Limits(max_connections=None, max_keepalive_connections=None)


async def answer(
    source: Path,
    results: Results,
    where: httpx.AsyncHTTPTransport | str,
    options: argparse.Namespace,
    progress: "Progress",
) -> None:
    """Send what has no result yet. Raises ServerLost."""
    async with connected(where, options.api_key or os.environ.get(KEY_VARIABLE)) as client:

        async def execute(method: str, url: str, body: bytes) -> tuple[int, bytes]:
            try:
                async with asyncio.timeout(options.timeout):
                    response, content = await exchanged(client, method, url, body)
            except TimeoutError:
                longest = f"no whole answer from {url} within {options.timeout:g} seconds (--timeout)"
                raise ServerLost(f"{longest}; {AGAIN}") from None
            except httpx.HTTPError as error:
                raise ServerLost(f"the server was lost ({error or type(error).__name__}); {AGAIN}") from error
            if response.status_code in (401, 403):
                raise ServerLost(f"the server wants another key; give it with --api-key or {KEY_VARIABLE}")
            if response.is_redirect or not is_answer(response.status_code, content):
                raise ServerLost(f"{response.url} answers HTTP {response.status_code}, which is no answer of its API")
            return response.status_code, content

        with source.open("rb") as file:
            await run_batch(lines.read(file), results, execute, options.concurrency, progress.show)


async def exchanged(client: httpx.AsyncClient, method: str, url: str, body: bytes) -> tuple[httpx.Response, bytes]:
    """A request's answer, and its body. Raises ServerLost where that has no end."""
    parts, size = [], 0
    async with client.stream(method, url, content=body, headers={"Content-Type": "application/json"}) as response:
        async for part in response.aiter_bytes():
            parts.append(part)
            size += len(part)
            if size > MAX_BATCH_ANSWER_BYTES:
                raise ServerLost(f"{response.url} answers with more than {MAX_BATCH_ANSWER_BYTES} bytes")
    return response, b"".join(parts)


class NotFound(msgspec.Struct):
    """What a server says of a path that it does not have."""

    detail: str


def is_answer(status: int, body: bytes) -> bool:
    """Whether this comes from the endpoint itself: a JSON object, and no word of a path that is not there."""
    try:
        msgspec.json.decode(body, type=dict[str, msgspec.Raw])
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if status != NOT_FOUND:
        return True
    try:
        msgspec.json.decode(body, type=NotFound)
    except msgspec.DecodeError:
        return True
    return False


NOT_FOUND = 404
AGAIN = "the same command goes on where this one ended"


@contextlib.asynccontextmanager
async def connected(where: httpx.AsyncHTTPTransport | str, key: str | None) -> AsyncIterator[httpx.AsyncClient]:
    if isinstance(where, str):
        made = httpx.AsyncClient(limits=NO_LIMITS, **client_options(where, key, None))  # type: ignore[arg-type]
    else:
        made = httpx.AsyncClient(transport=where, base_url="http://localhost", timeout=None)
    async with made as client:
        yield client


class Progress:
    """A bar on a terminal, else a line from time to time."""

    def __init__(self, total: int, results: Results) -> None:
        self._total = total
        self._results = results
        self._bar = tqdm(total=total, initial=results.count, unit="request", disable=not sys.stderr.isatty())
        self._said_at = time.monotonic()
        if results.count:
            say(f"{results.count} of {total} requests are done; going on", sys.stderr)

    def show(self) -> None:
        """One more is done."""
        self._bar.update()
        if self._bar.disable and time.monotonic() - self._said_at >= LINE_EVERY_S:
            self._said_at = time.monotonic()
            say(f"{self._results.count} of {self._total} requests are done", sys.stderr)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


def summary(results: Results, target: Path) -> str:
    """What has come of the batch."""
    failed = f", {results.failed} failed" if results.failed else ""
    answered = "1 request was" if results.succeeded == 1 else f"{results.succeeded} requests were"
    return f"{answered} answered{failed}: {target}"
