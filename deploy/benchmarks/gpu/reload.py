"""Weights from files while streams run, and how long a start takes."""

import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

from deploy.benchmarks.gpu.decoding import made
from deploy.benchmarks.gpu.engine import Engine, Run
from deploy.benchmarks.gpu.setting import Setting

MODEL = "qwen2.5-0.5b"
MEMORY = Path("/dev/shm")


def run(setting: Setting) -> None:
    engine = made(setting, MODEL, context_length=2048, running=16)
    root = MEMORY if MEMORY.is_dir() else None
    directory = Path(tempfile.mkdtemp(prefix="gpu-once-weights-", dir=root))
    try:
        checkpoint = save(engine, directory)
        read_alone(setting, engine, checkpoint)
        swap_under_load(setting, engine, directory)
    finally:
        shutil.rmtree(directory)


def save(engine: Engine, directory: Path) -> Path:
    """The engine's weights with other values, as a checkpoint."""
    from safetensors.torch import save_file

    weights = engine.worker.model.weights
    tensors = {name: (weights.view(name) * 1.01).cpu().contiguous() for name in weights.names()}
    save_file(tensors, directory / "model.safetensors")
    return directory / "model.safetensors"


def read_alone(setting: Setting, engine: Engine, file: Path) -> None:
    """Into the second set of buffers, by number of threads; the first time page-locks the memory."""
    from quartet.scheduler_service.weights import device_staging
    from quartet.scheduler_service.weights.checkpoint import Checkpoint

    weights = engine.worker.model.weights
    second = weights.staging()
    checkpoint = Checkpoint.open(file.parent)
    names = sorted(weights.names(), key=lambda name: checkpoint.tensors[name].offset)
    for threads in (1, 4, 8, 8, 12):
        begun = time.perf_counter()
        device_staging.read_to_device(checkpoint, names, second, threads=threads)
        taken = time.perf_counter() - begun
        rate = file.stat().st_size / taken / 1e9
        setting.report.figure(f"read {MODEL} with {threads} threads", taken * 1e3, "ms", None, 120, f"{rate:.1f} GB/s")
    begun = time.perf_counter()
    device_staging.changed_tensors(weights, second, names)
    setting.report.figure("compare all tensors", (time.perf_counter() - begun) * 1e3, "ms")


def swap_under_load(setting: Setting, engine: Engine, directory: Path) -> None:
    """Streams run while new weights are staged and put in place; what they feel is the largest gap."""
    from quartet.scheduler_service.weights.update import Updates

    with tempfile.TemporaryDirectory() as run_dir:
        updates = Updates(engine.worker.model.weights, engine.config, run_dir)
        for i in range(setting.size(8, 2)):
            engine.add(engine.prompt(64, i), setting.size(1500, 100))
        quiet = engine.run(setting.size(200, 10))
        for repeat in range(3):
            staged: list[object] = []
            work = threading.Thread(
                target=lambda staged=staged: staged.append(updates.from_disk(str(directory), "auto", None))
            )
            loaded, begun = Run(), time.perf_counter()
            work.start()
            while work.is_alive():
                engine.step(loaded)
            taken = time.perf_counter() - begun
            before = time.perf_counter()
            updates.swap(staged[0], f"v{repeat}")  # type: ignore[arg-type]
            swapped = time.perf_counter() - before
            for _ in range(5):
                engine.step(loaded)
            setting.report.figure(f"staging beside 8 streams, {repeat + 1}", taken * 1e3, "ms", None, 120)
            setting.report.figure("largest gap of the streams meanwhile", loaded.largest_gap_s() * 1e3, "ms", None, 5)
            setting.report.figure("the swap, as the host sees it", swapped * 1e3, "ms")
        gaps = sorted(b - a for a, b in zip(quiet.step_ends, quiet.step_ends[1:], strict=False))
        setting.report.figure("median gap of the streams before", statistics.median(gaps) * 1e3, "ms")


STARTED = """
import time
begun = time.perf_counter()
import sys, torch
from deploy.benchmarks.gpu.engine import Engine
from deploy.benchmarks.gpu.shapes import REHEARSAL, SHAPES
imported = time.perf_counter() - begun
shapes = REHEARSAL if sys.argv[2] == "rehearsal" else SHAPES
engine = Engine(shapes["{model}"], torch.device(sys.argv[1]), 512, 8, 4096)
ready = time.perf_counter() - begun
engine.add(engine.prompt(32), 4)
engine.run()
print(imported, ready, time.perf_counter() - begun)
"""


def start_up(setting: Setting) -> None:
    """A fresh process: imports, weights, recorded steps, a first answer. The second one finds compiled kernels."""
    kind = "rehearsal" if setting.rehearsal else "real"
    for repeat in range(2):
        begun = time.perf_counter()
        command = [sys.executable, "-c", STARTED.format(model=MODEL), setting.device.type, kind]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        whole = time.perf_counter() - begun
        imported, ready, answered = map(float, done.stdout.split()[-3:])
        setting.report.figure(f"start {repeat + 1}: imports", imported, "s")
        setting.report.figure(f"start {repeat + 1}: all sizes recorded", ready, "s", goal=6)
        setting.report.figure(f"start {repeat + 1}: first answer", answered, "s", note=f"process {whole:.1f} s")
