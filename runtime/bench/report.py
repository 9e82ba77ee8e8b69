"""Figures as tables for people. Pure: values in, lines out."""

from collections.abc import Iterator, Sequence

from quartet.runtime.bench.statistics import METRICS, Distribution, Summary, ratios

TITLES = {
    "ttft": "time to first token",
    "tpot": "time per output token",
    "itl": "gap between parts",
    "e2e": "whole request",
}
COLUMNS = ("mean", "p50", "p90", "p95", "p99", "max")
RATES = {
    "requests_per_s": "requests/s",
    "input_tokens_per_s": "input tokens/s",
    "output_tokens_per_s": "output tokens/s",
    "goodput_per_s": "good requests/s",
}


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Columns of equal width: the first to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i == 0 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        for row in rows
    ]


def milliseconds(seconds: float) -> str:
    """Three digits that count: 0.123, 12.3, 123, 12300."""
    value = seconds * 1e3
    return (
        f"{value:.3f}"
        if value < 1
        else f"{value:.2f}"
        if value < 10
        else f"{value:.1f}"
        if value < 100
        else f"{value:.0f}"
    )


def table(summary: Summary) -> list[str]:
    """All figures of one server."""
    measured = times(summary)
    return [*head(summary), *([""] if measured else []), *measured, *failures(summary)]


def head(summary: Summary) -> Iterator[str]:
    """What was done, and the rates."""
    cut = ", interrupted" if summary.interrupted else ""
    yield (
        f"{summary.completed} of {summary.requests} requests completed in {summary.duration_s:.2f} s, "
        f"{summary.concurrency:.1f} at once on average{cut}"
    )
    hits = f" ({summary.cached_tokens / summary.prompt_tokens:.0%} cached)" if summary.cached_tokens else ""
    yield f"tokens: {summary.prompt_tokens} in{hits}, {summary.completion_tokens} out"
    yield (
        f"{summary.requests_per_s:.2f} requests/s, {summary.input_tokens_per_s:.1f} input tokens/s, "
        f"{summary.output_tokens_per_s:.1f} output tokens/s"
    )
    if summary.slo:
        limits = ", ".join(f"{name} ≤ {limit:g} s" for name, limit in summary.slo.items())
        share = summary.good / summary.requests if summary.requests else 0.0
        yield f"goodput: {summary.goodput_per_s:.2f} requests/s ({share:.0%} of all) with {limits}"


def times(summary: Summary) -> list[str]:
    """Times in milliseconds, a row for each metric that was measured."""
    rows = [["ms", *COLUMNS]]
    for metric in METRICS:
        found: Distribution | None = getattr(summary, metric)
        if found is not None:
            label = f"{TITLES[metric]} ({metric.upper()})"
            rows.append([label, *(milliseconds(getattr(found, column)) for column in COLUMNS)])
    return aligned(rows) if len(rows) > 1 else []


def failures(summary: Summary) -> Iterator[str]:
    """How often requests failed, by reason."""
    if summary.errors:
        yield f"\n{summary.failed} failed:"
        yield from (f"  {count} × {text}" for text, count in summary.errors.items())


def comparison(first: Summary, second: Summary, names: tuple[str, str]) -> list[str]:
    """Both servers' figures side by side, and the second's over the first's."""
    found = ratios(first, second)
    rows = [["", "first", "second", "second / first"]]
    for name, title in RATES.items():
        if name in found:
            rows.append([title, *(f"{getattr(side, name):.2f}" for side in (first, second)), f"{found[name]:.3f}"])
    for metric in METRICS:
        for part in ("mean", "p50", "p99"):
            if ratio := found.get(f"{metric}_{part}"):
                cells = [milliseconds(getattr(getattr(side, metric), part)) for side in (first, second)]
                rows.append([f"{metric.upper()} {part}, ms", *cells, f"{ratio:.3f}"])
    rows.append(["completed", str(first.completed), str(second.completed), ""])
    rows.append(["failed", str(first.failed), str(second.failed), ""])
    return [f"first:  {names[0]}", f"second: {names[1]}", "", *aligned(rows), *failures(first), *failures(second)]
