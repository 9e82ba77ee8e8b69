"""`quartet health URL`: a line for the server, and one for each of its processes."""

import math
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence

import httpx
import msgspec

from quartet.runtime.client.arguments import KEY_VARIABLE, health_parser, parsed
from quartet.runtime.client.connection import (
    ClientError,
    base_url,
    check,
    connect,
    read_answer,
    unreachable,
)
from quartet.runtime.errors import UsageError
from quartet.runtime.log import plain, put, say
from quartet.runtime.messages import ROLES, SCHEDULER
from quartet.runtime.shorten import without_password

# a sample of Prometheus' text format: name, labels, value
SAMPLE = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)$", re.MULTILINE)
ROLE_LABEL = re.compile(r'\brole="([\w ]+)"')
RANK_LABEL = re.compile(r'\bdp_rank="(\d+)"')
HINTS = dict.fromkeys(("--url", "--host", "--port"), "the address comes first: quartet health http://127.0.0.1:30000")
RESTARTS, PID = "quartet:restarts_total", "quartet:process_pid"


class Verdict(msgspec.Struct):
    """The body of /health; empty where all is well."""

    status: str = "healthy"
    reason: str = ""


def main(argv: Sequence[str]) -> int:
    """Print how the server at an address is; returns 0 if it is healthy."""
    try:
        options = parsed(health_parser(), argv, HINTS)
        url = base_url(options.url)
        key = options.api_key or os.environ.get(KEY_VARIABLE)
        deadline_s = time.monotonic() + options.timeout
        with connect(url, key, options.timeout) as client:
            verdict = ask(client, "/health", deadline_s)
            ready = ask(client, "/readyz", deadline_s, optional=True) if verdict.status == "healthy" else verdict
            samples = read_samples(client, deadline_s)
    except UsageError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2
    except ClientError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 1
    for line in report(url, verdict, ready, samples):
        put(line)
    return int(verdict.status == "unhealthy")


def ask(client: httpx.Client, path: str, deadline_s: float, optional: bool = False) -> Verdict:
    """What the server says at a path. Raises ClientError. `optional`: servers of other makes may have no such path."""
    status, body, kind = fetch(client, path, deadline_s)
    if optional and status == 404:
        return Verdict()
    if status not in (200, 503):
        check(status, body)
    if status not in (200, 503) or kind.startswith("text/html"):
        raise ClientError(f"what answers at {client.base_url} is no server of language models")
    try:
        verdict = msgspec.json.decode(body, type=Verdict)
    except (msgspec.DecodeError, UnicodeDecodeError):  # others answer {"status": "ok"}, a text, or nothing
        verdict = Verdict()
    return Verdict("unhealthy", verdict.reason or f"{path} answers 503") if status == 503 else verdict


def fetch(client: httpx.Client, path: str, deadline_s: float) -> tuple[int, bytes, str]:
    """Status, body and content type. Raises ClientError."""
    try:
        with client.stream("GET", path) as answer:
            return answer.status_code, read_answer(answer, deadline_s), answer.headers.get("content-type", "")
    except httpx.HTTPError as error:
        raise unreachable(client.base_url, error) from error


def read_samples(client: httpx.Client, deadline_s: float) -> dict[str, dict[str, float]]:
    """Role → metric → value, from /metrics; a metric without a role stands under "". Empty where there are none."""
    try:
        status, body, _ = fetch(client, "/metrics", deadline_s)
    except ClientError:
        return {}
    return parse_samples(body.decode(errors="replace")) if status == 200 else {}


def parse_samples(text: str) -> dict[str, dict[str, float]]:
    """Role → metric → value, of an exposition in Prometheus' text format."""
    found: dict[str, dict[str, float]] = {}
    for name, labels, value in SAMPLE.findall(text):
        role = match[1] if (match := ROLE_LABEL.search(labels)) else ""
        if rank := RANK_LABEL.search(labels):
            role = f"load of {SCHEDULER} DP{rank[1]}"
        try:
            number = float(value)
        except ValueError:
            continue
        if math.isfinite(number):
            found.setdefault(role, {})[name] = number
    return found


def report(url: str, verdict: Verdict, ready: Verdict, samples: Mapping[str, Mapping[str, float]]) -> list[str]:
    """The lines that are printed."""
    reason = verdict.reason or ready.reason
    state = verdict.status if verdict.status in ("unhealthy", "resting") else "healthy"
    if state == "healthy" and ready.status == "unhealthy":
        state = "healthy, takes no requests"
    lines = [plain(f"{without_password(url)} is {state}{f': {reason}' if reason else ''}")]
    found = [role for role in samples if RESTARTS in samples[role]]
    roles = [role for place in ROLES for role in found if role.split(" ")[0] == place]
    width = max(map(len, roles), default=0)
    return lines + [f"  {role:<{width}}  {process(role, reason, samples)}" for role in roles]


def process(role: str, reason: str, samples: Mapping[str, Mapping[str, float]]) -> str:
    """How one process is: the reason that names it, how often it was started again, its id, the scheduler's load."""
    restarts = int(samples[role][RESTARTS])
    parts = [plain(reason) if f"the {role} " in f"{reason} " else "runs", f"{restarts} restart{'s' * (restarts != 1)}"]
    own = samples[role]
    if PID in own:
        parts.append(f"pid {own[PID]:.0f}")
    if "quartet:process_cpu_seconds_total" in own:
        parts.append(f"{own['quartet:process_cpu_seconds_total']:.1f} s of processor time")
    if "quartet:process_resident_memory_bytes" in own:
        parts.append(f"{own['quartet:process_resident_memory_bytes'] / 1e6:.0f} MB")
    if role.split(" ")[0] == SCHEDULER:
        load = samples.get("" if role == SCHEDULER else f"load of {role}", {})
        parts += [text.format(load[name]) for name, text in LOAD.items() if name in load]
    return ", ".join(parts)


LOAD = {
    "sglang:num_running_reqs": "{:.0f} running",
    "sglang:num_queue_reqs": "{:.0f} waiting",
    "sglang:gen_throughput": "{:.1f} tokens/s",
    "sglang:token_usage": "KV pool {:.0%} used",
    "sglang:cache_hit_rate": "cache hits {:.0%}",
}
