"""A picture of a run: how times are distributed, and output tokens over time."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from quartet.runtime.bench.records import Record
from quartet.runtime.bench.statistics import times_of
from quartet.runtime.errors import UsageError

NEEDS_MATPLOTLIB = "--plot needs matplotlib: pip install 'quartet-serve[plot]'"
PANELS = {"ttft": "time to first token", "tpot": "time per output token", "e2e": "whole request"}
BINS = 40
DPI = 130


def check() -> None:
    """Raise UsageError where nothing can be drawn, before anything is measured."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UsageError(NEEDS_MATPLOTLIB) from error


def throughput(records: Sequence[Record], bins: int = BINS) -> tuple[list[float], list[float]]:
    """Middles of equal spans of time, in seconds from the first request, and output tokens a second in each.

    A request's tokens are spread evenly from its first to its last part.
    """
    spans = [
        (r.first_at, r.last_at, r.completion_tokens)
        for r in records
        if r.first_at is not None and r.last_at is not None
    ]
    if not spans:
        return [], []
    begin = min(record.sent_at for record in records)
    width = max(max(last for _, last, _ in spans) - begin, 1e-9) / bins
    rates = [0.0] * bins
    for first, last, tokens in spans:
        lower, upper = (first - begin) / width, (last - begin) / width
        for i in range(int(lower), min(int(upper), bins - 1) + 1):
            inside = (min(upper, i + 1) - max(lower, i)) / (upper - lower) if upper > lower else 1.0
            rates[min(i, bins - 1)] += tokens * inside / width
    return [(i + 0.5) * width for i in range(bins)], rates


def draw(runs: dict[str, Sequence[Record]], target: Path) -> None:
    """Write the picture, a line for each server. Raises UsageError."""
    from matplotlib import figure  # here, for it is slow and seldom needed

    picture = figure.Figure(figsize=(11, 7), layout="constrained", dpi=DPI)
    axes = picture.subplots(2, 2).flatten()
    for name, records in runs.items():
        done = [record for record in records if not record.error]
        for panel, metric in zip(axes, PANELS, strict=False):
            distribution(panel, name, sorted(times_of(metric, done)))
        axes[3].plot(*throughput(done), label=name)
    for panel, title in zip(axes, PANELS.values(), strict=False):
        panel.set(title=title, xlabel="ms", ylabel="share of requests", ylim=(0, 1.02))
    axes[3].set(title="output", xlabel="s", ylabel="tokens/s")
    axes[3].set_ylim(bottom=0)
    if len(runs) > 1:
        axes[3].legend()
    try:
        picture.savefig(target)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UsageError(f"cannot write {target}: {error}") from error


def distribution(panel: Any, name: str, ordered: list[float]) -> None:
    """The share of values up to each."""
    shares = [(i + 1) / len(ordered) for i in range(len(ordered))]
    panel.step([value * 1e3 for value in ordered], shares, where="post", label=name)
