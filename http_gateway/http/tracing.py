"""OpenTelemetry traces by OTLP over HTTP (--otlp-traces-endpoint): one span for a call, one below it for each hop.

    POST /generate            from the call's arrival to its end; below the span that a traceparent header names
      tokenizer               sent by the gateway → the prompt is ids
      queue                   in the scheduler → started
      prefill                 → its first token
      decode                  → its last token
      detokenizer             → its last text

The hops write times into the request's Timeline; the spans are made here, at the end of the call, so nothing is done
for a call that is not sampled. They are sent by a thread of the SDK; what it cannot send is dropped and counted.
"""

import asyncio
import logging
import math
import random
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from urllib.parse import urlsplit

import msgspec
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
from opentelemetry.trace import Span, SpanKind, Status, StatusCode, get_current_span, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from quartet.http_gateway.http.auth import HeaderList
from quartet.http_gateway.http.call_record import CLIENT_LEFT, CallRecord, RequestRecord
from quartet.runtime.limits import MAX_LOGGED_REQUESTS
from quartet.runtime.shorten import without_password
from quartet.runtime.version import version

log = logging.getLogger(__name__)

DEFAULT_PATH = "/v1/traces"
W3C_HEADERS = (b"traceparent", b"tracestate")
EXPORT_TIMEOUT_S = 5
CLOSE_TIMEOUT_S = 2.0  # for the last spans, when the server stops
REPORT_EVERY_S = 60.0  # what was lost


@dataclass(frozen=True)
class Trace:
    """Of a call that is sampled."""

    parent: Context
    wall_offset_s: float  # from the monotonic clock to the time of day


class Losses:
    """Counts spans that end and those that arrive, and tells of the others: at once, each minute, and at the end.

    May be called from any thread.
    """

    def __init__(self, endpoint: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._endpoint = endpoint
        self._clock = clock
        self._lock = threading.Lock()
        self._ended = self._sent = self._told = self._untold = 0
        self._told_at = -math.inf
        self._closed = False

    def end(self) -> None:
        """One more is to be sent."""
        with self._lock:
            self._ended += 1

    def send(self, spans: int) -> None:
        with self._lock:
            self._sent += spans

    def lose(self, spans: int, reason: str) -> None:
        """So many were not taken."""
        with self._lock:
            self._untold += spans
            if not self._closed and self._clock() - self._told_at >= REPORT_EVERY_S:
                self._tell(reason)

    def close(self) -> None:
        """What has not been sent is lost, whatever became of it."""
        with self._lock:
            self._closed = True
            self._untold = self._ended - self._sent - self._told
            if self._untold > 0:
                self._tell("the server ends")

    def _tell(self, reason: str) -> None:
        spans = f"{self._untold} spans are" if self._untold != 1 else "1 span is"
        log.warning("Traces cannot be sent to %s (%s); %s lost.", self._endpoint, reason, spans)
        self._told, self._untold, self._told_at = self._told + self._untold, 0, self._clock()


class QuietExporter(SpanExporter):
    """Another exporter, whose failures are counted and never raised."""

    def __init__(self, inner: SpanExporter, losses: Losses) -> None:
        self._inner = inner
        self._losses = losses

    def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
        """Send spans."""
        reason = "they were refused"
        try:
            if self._inner.export(spans) is SpanExportResult.SUCCESS:
                self._losses.send(len(spans))
                return SpanExportResult.SUCCESS
        except Exception as error:  # of the network, of the collector, of the SDK: serving goes on
            reason = type(error).__name__
        self._losses.lose(len(spans), reason)
        return SpanExportResult.FAILURE

    def shutdown(self) -> None:
        self._inner.shutdown()


class CountedSpans(BatchSpanProcessor):
    """Has spans sent in batches, and counts those that it takes: it drops what finds no place in its queue."""

    def __init__(self, exporter: SpanExporter, losses: Losses) -> None:
        super().__init__(exporter)
        self._losses = losses

    def on_end(self, span: ReadableSpan) -> None:
        self._losses.end()
        super().on_end(span)


class OtlpTracer:
    """Decides which calls are traced, and sends their spans."""

    def __init__(self, endpoint: str, ratio: float, model_name: str) -> None:
        """`ratio`: share of the calls that are traced where the client has not decided."""
        for name in ("opentelemetry.exporter.otlp", "opentelemetry.sdk"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # QuietExporter says it
        url = endpoint if urlsplit(endpoint).path.strip("/") else endpoint.rstrip("/") + DEFAULT_PATH
        self._ratio = ratio
        self._model_name = model_name
        self._propagator = TraceContextTextMapPropagator()
        resource = Resource.create({"service.name": "quartet", "service.version": version()})
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._losses = Losses(without_password(url))
        exporter = QuietExporter(OTLPSpanExporter(endpoint=url, timeout=EXPORT_TIMEOUT_S), self._losses)
        self._provider.add_span_processor(CountedSpans(exporter, self._losses))
        self._tracer = self._provider.get_tracer("quartet")

    def begin(self, headers: HeaderList) -> Trace | None:
        """The trace of a call that begins; None where it is not sampled: by its parent, or by chance."""
        given = {name.decode(): value.decode("latin-1") for name, value in headers if name in W3C_HEADERS}
        parent = self._propagator.extract(given, Context())
        context = get_current_span(parent).get_span_context()
        sampled = context.trace_flags.sampled if context.is_valid else random.random() < self._ratio
        return Trace(parent, time.time() - time.monotonic()) if sampled else None

    def end(self, record: CallRecord) -> None:
        """Make the spans of a call that is over. Sends nothing itself, and raises nothing."""
        trace = record.trace
        assert isinstance(trace, Trace), trace
        span = self._tracer.start_span(
            f"{record.method} {record.route}",
            context=trace.parent,
            kind=SpanKind.SERVER,
            start_time=nanoseconds(record.started_at + trace.wall_offset_s),
            attributes=self._attributes(record),
        )
        if record.status is None or record.status >= 500:
            span.set_status(Status(StatusCode.ERROR))
        self._add_hops(span, record, trace.wall_offset_s)
        span.end(nanoseconds(record.ended_at + trace.wall_offset_s))

    def _attributes(self, record: CallRecord) -> dict[str, str | int | float | Sequence[str]]:
        """By OpenTelemetry's names for HTTP and for generative models; no text of anybody."""
        said = record.fields()
        found: dict[str, str | int | float | Sequence[str]] = {
            "http.request.method": record.method,
            "http.route": record.route,
            "http.response.status_code": CLIENT_LEFT if record.status is None else record.status,
            "gen_ai.request.model": self._model_name,
            "gen_ai.usage.input_tokens": said["prompt_tokens"],
            "gen_ai.usage.output_tokens": said["output_tokens"],
            "quartet.cached_tokens": said["cached_tokens"],
            "quartet.requests": said["requests"],
            "gen_ai.response.finish_reasons": sorted({request.finish or "abort" for request in record.requests}),
        }
        if said["first_token_s"] is not None:
            found["gen_ai.latency.time_to_first_token"] = said["first_token_s"]
        if record.request_id:
            found["quartet.request_id"] = record.request_id
        return found

    def _add_hops(self, parent: Span, record: CallRecord, wall_offset_s: float) -> None:
        context = set_span_in_context(parent)
        for request in record.requests[:MAX_LOGGED_REQUESTS]:
            for name, start, end in hops(request):
                span = self._tracer.start_span(
                    name,
                    context=context,
                    start_time=nanoseconds(start + wall_offset_s),
                    attributes={"quartet.rid": request.rid},
                )
                span.end(nanoseconds(end + wall_offset_s))

    async def close(self) -> None:
        """Send what is left, within a bound: a collector that does not answer holds no server up."""
        closing = threading.Thread(target=self._provider.shutdown, name="traces", daemon=True)
        closing.start()
        ends_at = time.monotonic() + CLOSE_TIMEOUT_S
        while closing.is_alive() and time.monotonic() < ends_at:
            await asyncio.sleep(0.01)
        self._losses.close()


def hops(request: RequestRecord) -> Iterator[tuple[str, float, float]]:
    """Name, start and end of each hop that a request has passed, as far as times have come back."""
    times = request.times
    if times is None or not all(map(math.isfinite, msgspec.structs.astuple(times))):
        return
    finished = times.finished_at or request.last_at  # an end that the detokenizer has found
    spans = [
        ("tokenizer", times.sent_at, times.tokenized_at),
        ("queue", times.queued_at, times.started_at),
        ("prefill", times.started_at, times.first_token_at),
        ("decode", times.first_token_at, finished),
        ("detokenizer", times.finished_at, times.text_at),
    ]
    for name, start, end in spans:
        if 0 < start <= end <= request.last_at:
            yield name, start, end


def nanoseconds(seconds: float) -> int:
    return int(seconds * 1e9)
