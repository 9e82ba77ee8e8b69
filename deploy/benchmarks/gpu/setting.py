"""What a section is given."""

import json
from dataclasses import dataclass
from pathlib import Path

import torch

from deploy.benchmarks.gpu.report import Report
from deploy.benchmarks.gpu.shapes import REHEARSAL, SHAPES, Limits

ASSUMED = Limits(bytes_per_s=4.3e12, flops_per_s=790e12)  # read on an H200; used where the first section gave nothing


@dataclass(frozen=True, slots=True)
class Setting:
    """Where and how large."""

    out: Path
    device: torch.device
    rehearsal: bool  # everything small: the code is tried, the figures mean nothing
    report: Report

    @property
    def shapes(self) -> dict[str, dict[str, object]]:
        return REHEARSAL if self.rehearsal else SHAPES

    def size(self, real: int, rehearsed: int) -> int:
        return rehearsed if self.rehearsal else real

    @property
    def limits(self) -> Limits:
        """What the first section measured, or what is known of such a device."""
        path = self.out / "ceilings.json"
        data = json.loads(path.read_text()) if path.is_file() else {}
        return Limits(data.get("bytes_per_s") or ASSUMED.bytes_per_s, data.get("flops_per_s") or ASSUMED.flops_per_s)
