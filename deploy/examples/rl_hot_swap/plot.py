"""Draw a run: reward by iteration, and what its weight updates cost.

python -m deploy.examples.rl_hot_swap.plot <directory>/history.json picture.png
"""

import json
import sys
from pathlib import Path
from statistics import median
from typing import Any

INK, PALE, ACCENT = "#1f3a5f", "#9db4c0", "#d1495b"
MS = 1000
LEGEND_ROOM = 1.45  # the height of the axes, in heights of the tallest bar


def draw(history: list[dict[str, Any]], picture: Path) -> None:
    """Write a PNG (or whatever the suffix says). Needs matplotlib: pip install 'quartet-serve[plot]'."""
    from matplotlib.figure import Figure  # an optional dependency, and slow to import

    figure = Figure(figsize=(10, 4), layout="constrained", dpi=120)
    rewards, costs = figure.subplots(1, 2)
    draw_rewards(rewards, history)
    draw_costs(costs, [entry["update"] | {"iteration": entry["iteration"]} for entry in history])
    figure.savefig(picture)


def draw_rewards(axes: Any, history: list[dict[str, Any]]) -> None:
    iterations = [entry["iteration"] for entry in history]
    for wish, style in zip(history[0]["wishes"], ("--", ":", "-."), strict=True):
        axes.plot(iterations, [entry["wishes"][wish] for entry in history], style, color=PALE, label=wish)
    axes.plot(iterations, [entry["reward"] for entry in history], "o-", color=INK, linewidth=2, label="reward")
    axes.set(title="Reward of sampled stories", xlabel="iteration", ylabel="mean over the rollouts", ylim=(0, 1.03))
    axes.legend(loc="lower right", frameon=False)
    tidy(axes)


def draw_costs(axes: Any, updates: list[dict[str, Any]]) -> None:
    iterations = [update["iteration"] for update in updates]
    latencies = [update["latency_s"] * MS for update in updates]
    gaps = [update["largest_gap_s"] * MS for update in updates]
    usual = median(update["usual_gap_s"] for update in updates) * MS
    axes.bar(iterations, latencies, color=PALE, label="update, from request to answer")
    axes.plot(iterations, gaps, "o", color=ACCENT, label="longest gap between two tokens of a stream")
    axes.axhline(usual, color=INK, linewidth=1, label=f"usual gap: {usual:.1f} ms")
    streams, complete = (sum(update[name] for update in updates) for name in ("streams", "complete_streams"))
    title = f"{len(updates)} weight updates: {complete} of {streams} streams complete"
    axes.set(title=title, xlabel="iteration", ylabel="milliseconds", ylim=(0, LEGEND_ROOM * max(latencies + gaps)))
    axes.legend(loc="upper right", frameon=False)
    tidy(axes)


def tidy(axes: Any) -> None:
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.get_major_locator().set_params(integer=True)


if __name__ == "__main__":
    draw(json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2]))
