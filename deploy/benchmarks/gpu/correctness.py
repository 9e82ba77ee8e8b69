"""Every operation on the device against torch, recorded steps against computed ones, draws against the CPU's.

Compiling takes most of the time, so the cases are spread over processes.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from deploy.benchmarks.gpu.setting import Setting
from deploy.benchmarks.gpu.shapes import REHEARSAL

PARTS = 6
SMALL_TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2}
FAULT_CHARACTERS = 400


def run(setting: Setting) -> None:
    report = setting.report
    parts = 1 if setting.rehearsal else PARTS
    with tempfile.TemporaryDirectory() as directory:
        command = [sys.executable, "-m", "deploy.benchmarks.gpu.correctness", setting.device.type, str(parts)]
        files = [Path(directory) / f"{part}.txt" for part in range(parts)]
        processes = [subprocess.Popen([*command, str(part), str(file)]) for part, file in enumerate(files)]
        faults = graphs_and_draws(setting)
        codes = [process.wait() for process in processes]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
    right = sum(line == "right" for line in lines)
    faults += [line for line in lines if line != "right"]
    faults += [f"a process ended with {code}" for code in codes if code]
    report.figure("cases that agree with torch", right, "cases", note=f"{len(faults)} faults")
    report.put(faults=faults)
    if faults:
        raise SystemExit(f"{len(faults)} faults, the first: {faults[0]}")


def graphs_and_draws(setting: Setting) -> list[str]:
    """The same requests with and without graphs and overlap, and seeded draws on both devices."""
    from deploy.benchmarks.gpu.engine import Engine

    faults = []
    config = {**REHEARSAL["qwen3-0.6b"], "hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
    if not setting.rehearsal:
        config["torch_dtype"] = "bfloat16"
    torch.manual_seed(1)
    recorded = Engine(config, setting.device, 512, 8, 8192, page_size=16)
    torch.manual_seed(1)
    computed = Engine(config, setting.device, 512, 8, 8192, page_size=16, disable_cuda_graph=True)
    for source, target in zip(*(e.worker.model.weights.buffers.values() for e in (recorded, computed)), strict=True):
        target.copy_(source)
    computed.worker.depth = 0
    for temperature in (0.0, 1.0):
        outputs = []
        for engine in (recorded, computed):
            for i in range(6):
                engine.add(engine.prompt(20 + 11 * i, seed=i), 24, temperature, seed=i)
            outputs.append(list(engine.run().outputs.values()))
        same = sum(a == b for a, b in zip(*outputs, strict=True))
        name = "drawn" if temperature else "greedy"
        setting.report.figure(f"{name} requests equal with and without graphs and overlap", same, "of 6")
        if same < 6:
            faults.append(f"{6 - same} of 6 {name} requests differ with and without graphs and overlap")
    return [*faults, *draws(setting)]


def draws(setting: Setting) -> list[str]:
    """Seeded draws from equal logits: the device's and the CPU's."""
    from quartet.kernels.ops import resolve
    from quartet.runtime.sampling import SamplingParams
    from quartet.scheduler_service.sampling.choose import sample
    from quartet.scheduler_service.sampling.rows import sampling_rows
    from quartet.scheduler_service.sampling.state import settings_of

    rows = 64
    logits = torch.randn(rows, 5000, generator=torch.Generator().manual_seed(3)) * 3
    settings = [settings_of(SamplingParams(), seed) for seed in range(rows)]
    expected = sample(logits.clone(), sampling_rows(settings, list(range(rows)))).tokens
    device = setting.device
    own, tokens = logits.to(device), torch.empty(rows, dtype=torch.int64, device=device)
    tops, masses = torch.empty(2, rows, -(-5000 // 4096), device=device)
    ones, valid = torch.ones(rows, device=device), torch.empty(rows, dtype=torch.int32, device=device)
    ops, places = resolve(device.type), torch.arange(rows, device=device)
    ops.process_logits(own, None, ones, tops, masses)
    ops.draw(own, tops, masses, 4096, ones, places, places, None, tokens, valid)
    same = int((tokens.cpu() == expected).sum())
    setting.report.figure("seeded draws equal to the CPU's", same, f"of {rows}")
    return [] if same >= rows - 1 else [f"{rows - same} of {rows} seeded draws differ from the CPU's"]


def check_part(device: str, parts: int, part: int, path: Path) -> None:
    """One process's share of the cases; a line for each."""
    from quartet.kernels.ops import resolve
    from tests.kernels.cases import assert_agree
    from tests.kernels.table import SERVED, SMALL

    cases = [(case, dtype) for dtype in SMALL_TOLERANCE for case in SMALL]
    cases += [] if device == "cpu" else [(case, torch.bfloat16) for case in SERVED]
    torch_ops, own_ops = resolve(device, "torch"), resolve(device)
    with path.open("w", buffering=1) as file:
        for case, dtype in cases[part::parts]:
            try:
                assert_agree(case, torch_ops, own_ops, dtype, device, SMALL_TOLERANCE[dtype])
                print("right", file=file)
            except Exception as error:  # whatever it is, it is a finding: the other cases go on
                fault = " ".join(f"{case.name} {dtype}: {type(error).__name__}: {error}".split())
                print(fault[:FAULT_CHARACTERS], file=file)


if __name__ == "__main__":
    check_part(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
