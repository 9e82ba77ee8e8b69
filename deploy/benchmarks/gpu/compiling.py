"""Kernels are compiled before anything is measured: one layer of each model, each in a process of its own.

A start compiles in threads already (scheduler_service/execution/compile_ahead.py); requests compile what it left out.
All is kept on disk, where the sections that follow find it.
"""

import subprocess
import sys
import time

import torch

from deploy.benchmarks.gpu.setting import Setting
from deploy.benchmarks.gpu.shapes import REHEARSAL, SHAPES

RUNNING = 256  # requests at once


def run(setting: Setting) -> None:
    names = list(setting.shapes)[: setting.size(len(SHAPES), 1)]
    begun = time.perf_counter()
    kind = "rehearsal" if setting.rehearsal else "real"
    command = [sys.executable, "-m", "deploy.benchmarks.gpu.compiling", setting.device.type, kind]
    processes = {name: subprocess.Popen([*command, name]) for name in names}
    faults = []
    for name, process in processes.items():
        code = process.wait()
        taken = time.perf_counter() - begun
        setting.report.put(**{name: f"ended with {code} after {taken:.1f} s at most"})
        faults += [f"{name}: ended with {code}"] if code else []
    setting.report.figure("all kernels of all models compiled", time.perf_counter() - begun, "s")
    if faults:
        raise SystemExit("; ".join(faults))


def compile_one(device: str, kind: str, name: str) -> None:
    """Serve a few requests with one layer of a model."""
    from deploy.benchmarks.gpu.engine import Engine

    shape = {**(REHEARSAL if kind == "rehearsal" else SHAPES)[name], "num_hidden_layers": 1}
    engine = Engine(shape, torch.device(device), 4096, RUNNING, 65536)
    for temperature in (0.0, 0.6):
        for length in (3, 32, 200):
            engine.add(engine.prompt(length), 3, temperature)
            engine.run()


if __name__ == "__main__":
    compile_one(*sys.argv[1:4])
