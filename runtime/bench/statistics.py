"""From records to figures. Pure: no clock, no server."""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from quartet.runtime.bench.records import Record

METRICS = ("ttft", "tpot", "itl", "e2e")


class Distribution(msgspec.Struct, frozen=True):
    """Of times, in seconds."""

    count: int
    mean: float
    p50: float
    p90: float
    p95: float
    p99: float
    max: float


class Summary(msgspec.Struct, frozen=True):
    """The figures of a run. Rates are per second of `duration_s`, the sum over runs of first request to last end."""

    requests: int  # that have ended
    completed: int
    failed: int
    errors: dict[str, int]  # by text
    interrupted: bool
    duration_s: float
    concurrency: float  # requests that ran at once, on average
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    requests_per_s: float
    input_tokens_per_s: float
    output_tokens_per_s: float
    ttft: Distribution | None
    tpot: Distribution | None
    itl: Distribution | None  # gaps between parts of answers
    e2e: Distribution | None
    slo: dict[str, float]
    good: int  # completed requests that kept every limit
    goodput_per_s: float


def percentile(ordered: Sequence[float], share: float) -> float:
    """The value below which this share of sorted values lies, between two of them linearly."""
    position = share * (len(ordered) - 1)
    below = math.floor(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def distribution(values: Iterable[float]) -> Distribution | None:
    """None where there are no values."""
    ordered = sorted(values)
    if not ordered:
        return None
    p50, p90, p95, p99 = (percentile(ordered, share) for share in (0.5, 0.9, 0.95, 0.99))
    return Distribution(len(ordered), sum(ordered) / len(ordered), p50, p90, p95, p99, ordered[-1])


def times_of(metric: str, records: Iterable[Record]) -> list[float]:
    """All values of a metric, in seconds."""
    if metric == "itl":
        return [gap for record in records for gap in record.gaps]
    return [value for record in records if (value := getattr(record, metric)) is not None]


def is_good(record: Record, slo: Mapping[str, float]) -> bool:
    """Whether a completed request kept every limit; an answer of one token has no time per token to break."""
    values = {name: getattr(record, name) for name in slo}
    return all(value is None or value <= slo[name] for name, value in values.items())


def duration(records: Sequence[Record]) -> float:
    """Seconds from the first request to the last end."""
    ends = [record.ended_at for record in records if record.ended_at is not None]
    return max(ends) - min(record.sent_at for record in records) if ends else 0.0


def summarize(runs: Sequence[Sequence[Record]], slo: Mapping[str, float], interrupted: bool = False) -> Summary:
    """The figures of one run, or of several that were made after another."""
    records = [record for run in runs for record in run]
    done = [record for record in records if not record.error]
    seconds = sum(duration(run) for run in runs)
    prompt, cached, completion = (
        sum(getattr(record, name) for record in done)
        for name in ("prompt_tokens", "cached_tokens", "completion_tokens")
    )
    good = sum(is_good(record, slo) for record in done)
    return Summary(
        requests=len(records),
        completed=len(done),
        failed=len(records) - len(done),
        errors=dict(Counter(record.error for record in records if record.error).most_common()),
        interrupted=interrupted,
        duration_s=seconds,
        concurrency=per_second(sum(times_of("e2e", records)), seconds),
        prompt_tokens=prompt,
        cached_tokens=cached,
        completion_tokens=completion,
        requests_per_s=per_second(len(done), seconds),
        input_tokens_per_s=per_second(prompt, seconds),
        output_tokens_per_s=per_second(completion, seconds),
        **{name: distribution(times_of(name, done)) for name in METRICS},
        slo=dict(slo),
        good=good,
        goodput_per_s=per_second(good, seconds),
    )


def per_second(amount: float, seconds: float) -> float:
    return amount / seconds if seconds > 0 else 0.0


def ratios(first: Summary, second: Summary) -> dict[str, float]:
    """The second's figures over the first's: rates above 1 are better, times below 1."""
    found = {
        name: getattr(second, name) / getattr(first, name)
        for name in ("requests_per_s", "output_tokens_per_s", "goodput_per_s")
        if getattr(first, name) and (first.slo or name != "goodput_per_s")
    }
    for metric in METRICS:
        one, other = getattr(first, metric), getattr(second, metric)
        if one is not None and other is not None:
            found |= {
                f"{metric}_{part}": getattr(other, part) / getattr(one, part)
                for part in ("mean", "p50", "p99")
                if getattr(one, part)
            }
    return found
