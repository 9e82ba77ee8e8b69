"""Prints a table of what each field costs, and the rows that break the rule."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise

from tests.linear_cost.fields import Field, all_fields
from tests.linear_cost.measure import ROLES, Costs, Meter, Stream, streaming
from tests.servers import Server, launched

MOST_RATIO = 2.3  # of the costs of a size and of half of it
MOST_GAP = 3  # times the largest gap of a quiet server
FLOOR_S = 0.035  # costs below are noise: 4 ns a byte, as much as reading the largest body a few times from memory
TRIES = 8  # of a measurement that looks bad: other programs run on the machine too
LOOKS_AGAIN = 2  # at the fields that broke the rule, when all have been measured
QUIET_S = 6.0
EMBEDS = (
    *("/encode", "/classify", "/v1/embeddings", "/v1/classify", "/v1/rerank"),
    *("/embed", "/embed_all", "/embed_sparse", "/pooling", "/similarity", "/predict"),
)


@dataclass
class Row:
    """What was measured of one field."""

    field: Field
    sizes: list[int]
    statuses: list[int]
    costs: list[Costs]  # the least that was seen at each size
    gap_s: float = 0.0

    def ratio(self, role: str) -> float:
        """The largest of a size to half of it, where the larger is no noise."""
        spent = [cost.get(role, 0.0) for cost in self.costs]
        pairs = [(small, large) for small, large in pairwise(spent) if large >= FLOOR_S]
        return max((large / max(small, FLOOR_S / 4) for small, large in pairs), default=0.0)

    @property
    def steep(self) -> bool:
        return any(self.ratio(role) > MOST_RATIO for role in ROLES)

    def line(self, quiet_s: float) -> str:
        last = " ".join(f"{1000 * self.costs[-1].get(role, 0):6.0f}" for role in ROLES)
        ratio = max(map(self.ratio, ROLES))
        gap = f"{1000 * self.gap_s:5.0f}" if self.gap_s else "    -"
        mark = " STEEP" if self.steep else ""
        mark += " GAP" if self.gap_s > MOST_GAP * quiet_s else ""
        where = f"{self.field.route.path} {self.field.name} = {self.field.filling}"
        return f"{where[:78]:78} {self.statuses[-1]:3} {last} {ratio:5.2f} {gap}{mark}"


def measured(meter: Meter, field: Field, sizes: list[int]) -> Row:
    """A row, measured again where it looks bad."""
    row = Row(field, sizes, [], [])
    for size in sizes:
        status, cost = meter.cost(field, size)
        row.statuses.append(status)
        row.costs.append(cost)
    for _ in range(TRIES):
        if not row.steep:
            break
        for index, size in enumerate(sizes):
            _, cost = meter.cost(field, size)
            row.costs[index] = {role: min(cost[role], row.costs[index][role]) for role in cost}
    return row


def gap_beside(meter: Meter, stream: Stream, field: Field, size: int, quiet_s: float) -> float:
    """The largest gap of a stream while the request is served; the least of a few tries."""
    least = float("inf")
    body = field.body(size)  # before: this process reads the stream too, and building a body would delay it
    for _ in range(TRIES):
        began = time.monotonic()
        meter.send(field, body)
        time.sleep(0.1)
        least = min(least, stream.largest_gap(began))
        if least <= MOST_GAP * quiet_s:
            break
    return least


@contextmanager
def server_for(embeds: bool) -> Iterator[Server]:
    flags = ["--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--log-level", "error"]
    flags += ["--schedule-policy", "priority", "--watchdog-timeout", "0"]
    with launched(*flags, *(["--is-embedding"] if embeds else [])) as server:
        yield server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--route", default="", help="only this one")
    parser.add_argument("--field", default="", help="only fields with this in their name")
    parser.add_argument("--largest", type=int, default=8_300_000, help="bytes of the largest body")
    parser.add_argument("--doublings", type=int, default=3)
    parser.add_argument("--no-gaps", action="store_true", help="only the costs")
    options = parser.parse_args()
    sizes = [options.largest >> n for n in range(options.doublings, -1, -1)]
    fields = [field for field in all_fields(options.route) if options.field in field.name]
    print(f"{'field':78} end  {' '.join(f'{role[:6]:>6}' for role in ROLES)} ratio   gap    (ms of CPU at {sizes[-1]})")
    bad = 0
    for embeds in (False, True):
        chosen = [field for field in fields if (field.route.path in EMBEDS) is embeds]
        if chosen:
            with server_for(embeds) as server:
                broken = look(server, chosen, sizes, gaps=not (options.no_gaps or embeds))
                for _ in range(LOOKS_AGAIN):
                    if not broken:
                        break
                    print(f"{len(broken)} fields once more, as the machine may have been busy:")
                    broken = look(server, broken, sizes, gaps=not (options.no_gaps or embeds))
                bad += len(broken)
    print(f"{len(fields)} fields, {bad} of them break the rule")
    sys.exit(bool(bad))


def look(server: Server, fields: list[Field], sizes: list[int], *, gaps: bool) -> list[Field]:
    """Print a row for each field; returns those that break the rule, by the quiet gap of now."""
    meter = Meter(server)
    rows = [measured(meter, field, sizes) for field in fields]
    quiet_s = 0.0
    if gaps:
        with streaming(server) as stream:
            began = time.monotonic()
            time.sleep(QUIET_S)
            quiet_s = stream.largest_gap(began)
            print(f"largest gap of a quiet server: {1000 * quiet_s:.0f} ms")
            for row in rows:
                row.gap_s = gap_beside(meter, stream, row.field, sizes[-1], quiet_s)
    for row in rows:
        print(row.line(quiet_s), flush=True)
    return [row.field for row in rows if row.steep or (gaps and row.gap_s > MOST_GAP * quiet_s)]


if __name__ == "__main__":
    main()
