"""One section in its process: `python -m deploy.benchmarks.gpu.section NAME OUT DEVICE real|rehearsal`."""

import sys
from importlib import import_module
from pathlib import Path

import torch

from deploy.benchmarks.gpu.report import Report
from deploy.benchmarks.gpu.sections import SECTIONS
from deploy.benchmarks.gpu.setting import Setting


def main(name: str, out: str, device: str, kind: str) -> None:
    section = next(section for section in SECTIONS if section.name == name)
    report = Report(Path(out) / f"{name}.json")
    report.put(section=name, device=describe(device))
    work = getattr(import_module(f"deploy.benchmarks.gpu.{section.module}"), section.function)
    work(Setting(Path(out), torch.device(device), kind == "rehearsal", report))
    report.put(complete=True)


def describe(device: str) -> dict[str, object]:
    facts: dict[str, object] = {"torch": torch.__version__, "python": sys.version.split()[0]}
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        facts.update(name=properties.name, memory_gb=round(properties.total_memory / 2**30, 1), cuda=torch.version.cuda)
    return facts


if __name__ == "__main__":
    main(*sys.argv[1:5])
