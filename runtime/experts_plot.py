"""`quartet experts plot dump.pt`: a recording of experts as a heat map of layers by experts.

It reads the .csv that the server writes with every .pt: that file can hold nothing but numbers.
"""

import argparse
import csv
import math
import sys
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import NoReturn

from quartet.runtime.errors import UsageError
from quartet.runtime.log import plain, put, say

HEADER = ["layer_id", "expert_id", "count"]
PALETTE = ["#f7fbff", "#6baed6", "#08306b"]
DENSE = "#e8e6e3"  # layers without a choice
DPI = 150
NEEDS_MATPLOTLIB = "drawing needs matplotlib: pip install 'quartet-serve[plot]'"

Counts = list[list[int]]  # by layer and expert


def main(argv: Sequence[str]) -> int:
    """Draw one recording; returns the exit status."""
    try:
        arguments = parse(argv)
        counts = read_table(table_of(arguments.dump))
        target = arguments.output or arguments.dump.with_suffix(".png")
        draw(counts, arguments.dump.stem, target)
    except UsageError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2
    layers, experts = len(counts), len(counts[0])
    put(f"{target}: {layers} layers x {experts} experts, {sum(map(sum, counts))} choices")
    return 0


class Parser(argparse.ArgumentParser):
    """Whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"{message}; the command is `quartet experts plot dump.pt [--output picture.png]`")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="quartet experts", description=__doc__)
    parser.add_argument("action", type=str.lower, choices=["plot"])
    parser.add_argument("dump", type=Path, help="the .pt of a dump, or its .csv")
    parser.add_argument("-o", "--output", type=Path, help="the picture (default: the dump's name with .png)")
    return parser.parse_args(argv)


def table_of(dump: Path) -> Path:
    """The .csv of a dump. Raises UsageError."""
    table = dump.with_suffix(".csv")
    if not table.is_file():
        raise UsageError(f"no {table}; the server writes it with the .pt of /dump_expert_distribution_record")
    return table


def read_table(table: Path) -> Counts:
    """The counts of a table. Raises UsageError for what is none."""
    try:
        with table.open(newline="") as file:
            rows = csv.reader(file)
            header = next(rows, None)
            cells = [(int(layer), int(expert), int(count)) for layer, expert, count in rows]
    except (OSError, ValueError, csv.Error) as error:
        raise UsageError(f"cannot read {table}: {error}") from error
    layers, experts = (1 + max((cell[column] for cell in cells), default=-1) for column in (0, 1))
    whole = len(cells) == layers * experts and [cell[:2] for cell in cells] == list(
        product(range(layers), range(experts))
    )
    if header != HEADER or not cells or not whole:
        raise UsageError(f"{table} is no table of {', '.join(HEADER)} with a line for each layer and expert")
    return [[count for _, _, count in cells[layer * experts : (layer + 1) * experts]] for layer in range(layers)]


def loads(counts: Counts) -> list[list[float]]:
    """Each expert's load relative to an even share of its layer, NaN in layers that chose none."""
    return [[count * len(row) / total if (total := sum(row)) else float("nan") for count in row] for row in counts]


def draw(counts: Counts, title: str, target: Path) -> None:
    """Write the picture. Raises UsageError."""
    try:
        from matplotlib import colors, figure, ticker  # here, for it is slow and seldom needed
    except ImportError as error:
        raise UsageError(NEEDS_MATPLOTLIB) from error
    layers, experts = len(counts), len(counts[0])
    size = min(4 + experts * 0.16, 20), min(max(2.2 + layers * 0.22, 3.2), 14)
    picture = figure.Figure(figsize=size, layout="constrained", dpi=DPI)
    axes = picture.subplots()
    grid = loads(counts)
    most = max((load for row in grid for load in row if not math.isnan(load)), default=1.0)
    palette = colors.LinearSegmentedColormap.from_list("load", PALETTE).with_extremes(bad=DENSE)
    image = axes.imshow(grid, cmap=palette, vmin=0, vmax=most, aspect="auto", interpolation="nearest")
    axes.set(xlabel="expert", ylabel="layer")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_locator(ticker.MaxNLocator(nbins=12, integer=True))
    axes.set_title(f"{title}\n{sum(map(sum, counts)):,} choices", fontsize=10, loc="left")
    picture.colorbar(image, ax=axes, label="load (1 = even share of the layer)")
    try:
        picture.savefig(target)
    except (OSError, ValueError) as error:  # ValueError: a suffix that matplotlib does not know
        raise UsageError(f"cannot write {target}: {error}") from error
