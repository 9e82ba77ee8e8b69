"""Prometheus metrics by the names that dashboards of this API know.

Requests are measured here, where their text arrives; the scheduler's gauges and counters come from a probe of the
ring and are shown as they were last said. The text is rendered off the event loop and kept for a moment.
"""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from quartet.http_gateway.ring.counter_cache import Counters
from quartet.http_gateway.ring.journal import JournalEntry
from quartet.runtime.limits import MAX_ADAPTER_LABELS
from quartet.runtime.messages import SCHEDULER, Text, processes
from quartet.runtime.process.usage import usage_of

PREFIX = "sglang:"
KEPT_S = 0.1
ID_BYTES = 4

LATENCY_BUCKETS = (0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8, 10, 20, 40, 60, 80, 100, 200, 400)
E2E_BUCKETS = (*LATENCY_BUCKETS, 600, 1200, 1800, 2400)
QUEUE_BUCKETS = (0.001, 0.005, 0.01, 0.05, *LATENCY_BUCKETS)
TOKEN_BUCKETS = (
    *(0.002, 0.004, 0.006, 0.008, 0.01, 0.015, 0.02, 0.025, 0.03, 0.035, 0.04),
    *(0.06, 0.08, 0.1, 0.2, 0.4, 0.6, 0.8, 1, 2, 4, 6, 8),
)

# Counted by the gateway, of requests whose clients want them counted; the scheduler's own are not shown beside them.
OURS = {"prompt_tokens", "generation_tokens", "cached_tokens", "num_requests", "num_aborted_requests"}
TOTAL = "_total"
OTHER_ADAPTERS = "(others)"
Family = CounterMetricFamily | GaugeMetricFamily
TEXT_SERVICES = ("tokenizer", "detokenizer")
NOW = {"waiting", "running"}  # of the text services: how many there are now; all else is counted since their start


class RingCollector:
    """The numbers that the hops said in the last probe."""

    def __init__(self, model_name: str) -> None:
        self.counters: Counters = {}
        self._labels = {"model_name": model_name, "engine_type": "unified", "tp_rank": "0", "pp_rank": "0"}

    def collect(self) -> Iterator[Metric]:
        """One family for each name; of several schedulers it has a sample for each, with its rank."""
        families: dict[str, Family] = {}
        several = [title for title in self.counters if title.startswith(f"{SCHEDULER} ")]
        for title, numbers in self.counters.items():
            role, rank = title.split(" DP") if title in several else (title, "")
            if role == SCHEDULER and several and not rank:
                continue  # those of all together
            for name, value in numbers.items():
                if isinstance(value, int | float) and not (role == SCHEDULER and name.removesuffix(TOTAL) in OURS):
                    self._add(families, role, rank, name, value)
        yield from families.values()

    def _add(self, families: dict[str, Family], role: str, rank: str, name: str, value: float) -> None:
        """Add a sample: of a counter where the name ends in _total, or a text service has counted; else of a gauge."""
        if role in TEXT_SERVICES and name not in NOW:
            name = name.removesuffix(TOTAL) + TOTAL
        kind = CounterMetricFamily if name.endswith(TOTAL) else GaugeMetricFamily
        full = PREFIX + name if role == SCHEDULER else f"quartet:{role}_{name}"
        labels = self._labels if role == SCHEDULER else {"model_name": self._labels["model_name"]}
        labels = labels | ({"dp_rank": rank} if rank else {})
        if full not in families:
            families[full] = kind(full, f"{name.replace('_', ' ')} ({role})", labels=list(labels))
        families[full].add_metric(list(labels.values()), value)


class RestartCollector:
    """How often each process was started again: its epoch, which the launcher keeps."""

    def __init__(self, newest_epoch: Callable[[str], int], schedulers: int) -> None:
        self._newest_epoch = newest_epoch
        self._processes = processes(schedulers)

    def collect(self) -> Iterator[Metric]:
        family = CounterMetricFamily("quartet:restarts", "Processes that were started again.", labels=["role"])
        for title, key in self._processes.items():
            family.add_metric([title], self._newest_epoch(key))
        yield family


class ProcessCollector:
    """Which process of the system each one of the server is, and what it has used: CPU time, and memory now."""

    def __init__(self, pids: Callable[[], Mapping[str, int]]) -> None:
        self._pids = pids

    def collect(self) -> Iterator[Metric]:
        """One sample for each process that runs."""
        cpu = CounterMetricFamily("quartet:process_cpu_seconds", "CPU time of a process.", labels=["role"])
        ids = GaugeMetricFamily("quartet:process_pid", "Process id of a process.", labels=["role"])
        memory = GaugeMetricFamily("quartet:process_resident_memory_bytes", "Memory of a process.", labels=["role"])
        for role, pid in self._pids().items():
            if usage := usage_of(pid):
                ids.add_metric([role], pid)
                cpu.add_metric([role], usage.cpu_s)
                memory.add_metric([role], usage.resident_bytes)
        yield ids
        yield cpu
        yield memory


class AdapterCounters:
    """Requests and tokens by LoRA adapter. There are only so many labels: all further adapters are counted together."""

    def __init__(self, model_name: str, registry: CollectorRegistry) -> None:
        self._model_name = model_name
        self._named: set[str] = set()
        labels = ["model_name", "lora_name"]
        self._requests, self._prompt_tokens, self._generation_tokens = (
            Counter(f"quartet:adapter_{name}_total", f"{help} by adapter.", labels, registry=registry)
            for name, help in (
                ("requests", "Finished requests"),
                ("prompt_tokens", "Prompt tokens of finished requests"),
                ("generation_tokens", "Output tokens of finished requests"),
            )
        )

    def count(self, entry: JournalEntry) -> None:
        """One request of an adapter has finished."""
        name = entry.request.adapter
        if len(self._named) < MAX_ADAPTER_LABELS:
            self._named.add(name)
        labels = self._model_name, name if name in self._named else OTHER_ADAPTERS
        self._requests.labels(*labels).inc()
        self._prompt_tokens.labels(*labels).inc(entry.prompt_tokens)
        self._generation_tokens.labels(*labels).inc(len(entry.delivered) // ID_BYTES)


def no_processes() -> Mapping[str, int]:
    return {}


class Metrics:
    """Everything the gateway counts. `newest_epoch`: of a process by its key, as the launcher announces it."""

    content_type = "text/plain; version=0.0.4; charset=utf-8"

    def __init__(
        self,
        model_name: str,
        newest_epoch: Callable[[str], int],
        pids: Callable[[], Mapping[str, int]] = no_processes,
        schedulers: int = 1,
    ) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]
        self._registry = CollectorRegistry()
        self._ring = RingCollector(model_name)
        self._registry.register(self._ring)
        self._registry.register(RestartCollector(newest_epoch, schedulers))
        self._registry.register(ProcessCollector(pids))
        self._model_name = model_name
        self._prompt_tokens = self._counter("prompt_tokens_total", "Prompt tokens of finished requests.")
        self._generation_tokens = self._counter("generation_tokens_total", "Output tokens of finished requests.")
        self._cached_tokens = self._counter("cached_tokens_total", "Prompt tokens found in the prefix cache.")
        self._requests = self._counter("num_requests_total", "Finished requests.")
        self._constrained = self._counter("num_so_requests_total", "Finished requests for structured output.")
        self._aborted = self._counter("num_aborted_requests_total", "Aborted requests.")
        self._adapters = AdapterCounters(model_name, self._registry)
        self._first_token = self._histogram("time_to_first_token_seconds", "Time to first token.", LATENCY_BUCKETS)
        self._queue = self._histogram("queue_time_seconds", "Time in the waiting queue.", QUEUE_BUCKETS)
        self._between_tokens = self._histogram("inter_token_latency_seconds", "Time between tokens.", TOKEN_BUCKETS)
        self._whole_request = self._histogram("e2e_request_latency_seconds", "Time of a whole request.", E2E_BUCKETS)
        self._http_requests = Counter(
            PREFIX + "http_requests_total", "HTTP requests.", ["endpoint", "method"], registry=self._registry
        )
        self._http_responses = Counter(
            PREFIX + "http_responses_total",
            "HTTP responses.",
            ["endpoint", "status_code", "method"],
            registry=self._registry,
        )
        self.http_active = Gauge(
            PREFIX + "http_requests_active", "HTTP requests being served.", registry=self._registry
        )
        self._text = b""
        self._rendered_at = -float("inf")
        self._lock = asyncio.Lock()

    def _counter(self, name: str, help: str) -> Counter:
        return Counter(PREFIX + name, help, ["model_name"], registry=self._registry).labels(self._model_name)

    def _histogram(self, name: str, help: str, buckets: tuple[float, ...]) -> Histogram:
        family = Histogram(PREFIX + name, help, ["model_name"], buckets=buckets, registry=self._registry)
        return family.labels(self._model_name)

    # requests

    def count_delta(self, entry: JournalEntry, text: Text, now: float) -> None:
        """One step of a request has arrived and is entered in `entry`, all but the time."""
        if not entry.request.log_metrics:
            return
        tokens = text.tokens
        if tokens.queue_s is not None and not entry.last_heard_at:
            self._queue.observe(tokens.queue_s)
        if added := len(tokens.ids) // ID_BYTES:
            if entry.last_heard_at:
                self._between_tokens.observe((now - entry.last_heard_at) / added)
            else:
                self._first_token.observe(now - entry.sent_at)
        if tokens.finish is not None:
            self._count_finished(entry, text, now)

    def _count_finished(self, entry: JournalEntry, text: Text, now: float) -> None:
        self._requests.inc()
        self._constrained.inc(entry.request.params.grammar is not None)
        self._aborted.inc(text.tokens.finish is not None and text.tokens.finish.reason == "abort")
        self._prompt_tokens.inc(entry.prompt_tokens)
        self._cached_tokens.inc(entry.cached_tokens)
        self._generation_tokens.inc(len(entry.delivered) // ID_BYTES)
        self._whole_request.observe(now - entry.sent_at)
        if entry.request.adapter:
            self._adapters.count(entry)

    # http

    def received(self, endpoint: str, method: str) -> None:
        self._http_requests.labels(endpoint, method).inc()

    def answered(self, endpoint: str, status: int, method: str) -> None:
        self._http_responses.labels(endpoint, str(status), method).inc()

    # text

    async def text(self, counters: Counters) -> bytes:
        """The exposition format, at most KEPT_S old."""
        async with self._lock:
            if time.monotonic() - self._rendered_at > KEPT_S:
                self._ring.counters = counters
                self._text = await asyncio.to_thread(generate_latest, self._registry)
                self._rendered_at = time.monotonic()
        return self._text
