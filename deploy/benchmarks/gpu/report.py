"""What a section has found: written after every figure, so that what was found is kept when the section is ended."""

import json
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(slots=True)
class Report:
    """One section's JSON file."""

    path: Path
    started: float = field(default_factory=time.monotonic)
    data: dict[str, Any] = field(default_factory=lambda: {"figures": []})

    def put(self, **values: Any) -> None:
        """Note facts of the section."""
        self.data.update(values)
        self.write()

    def figure(
        self,
        name: str,
        value: float,
        unit: str,
        ceiling: float | None = None,
        goal: float | None = None,
        note: str = "",
    ) -> None:
        """Note one line of the table. `ceiling`: the best value that the limits of this device allow."""
        fraction = None
        if ceiling and value:
            fraction = ceiling / value if unit in ("s", "ms", "us") else value / ceiling
        row = {"name": name, "value": value, "unit": unit, "ceiling": ceiling, "fraction": fraction, "goal": goal}
        self.data["figures"].append({**row, "note": note})
        print(line(self.data["figures"][-1]), flush=True)
        self.write()

    def write(self) -> None:
        self.data["elapsed_s"] = round(time.monotonic() - self.started, 2)
        unfinished = self.path.with_suffix(".part")
        unfinished.write_text(json.dumps(self.data, indent=1))
        unfinished.replace(self.path)


def line(figure: dict[str, Any]) -> str:
    """One line of the table: the fraction of the ceiling comes first."""
    fraction = "      " if figure["fraction"] is None else f"{100 * figure['fraction']:5.1f}%"
    ceiling = "" if figure["ceiling"] is None else f"of {figure['ceiling']:,.5g} "
    goal = "" if figure["goal"] is None else f"(goal {figure['goal']:,.5g}) "
    return (
        f"{fraction}  {figure['name']:<58} {figure['value']:>12,.5g} {figure['unit']} {ceiling}{goal}{figure['note']}"
    )


def table(results: dict[str, dict[str, Any]]) -> str:
    """All sections, in their order."""
    lines = []
    for section, result in results.items():
        lines.append(f"── {section}: {result['status']} ({result.get('elapsed_s', 0)} s)")
        lines += [line(figure) for figure in result.get("figures", [])]
    return "\n".join(lines)
