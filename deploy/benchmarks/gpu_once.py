"""Everything about one GPU in one command of at most ten minutes, on a bare machine and without a download.

    python -m deploy.benchmarks.gpu_once --out DIRECTORY [--wheels DIRECTORY] [--sections single batches] [--budget 585]
    python -m deploy.benchmarks.gpu_once --list
    python -m deploy.benchmarks.gpu_once --rehearse --out DIRECTORY      the same code on a CPU with tiny models

Weights are random and made on the device. Each section runs in a process of its own, with a deadline of its own: a
fault of the device or a hang ends that section alone. Its figures are written as they are found. The table comes
last; the first column is the fraction of what the device can do at best, as measured by the first section.

The machine needs Python 3.11 or later, torch and triton. The engine needs msgspec, xxhash and llguidance besides,
the server pyzmq, starlette, uvicorn and what they need: `--wheels` names a directory with wheels of what is not
installed. A section that lacks a package is skipped, and says which.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from deploy.benchmarks.gpu import packages
from deploy.benchmarks.gpu.report import table
from deploy.benchmarks.gpu.sections import SECTIONS, Section

ROOT = Path(__file__).resolve().parents[2]
BUDGET_S = 585
LEAST_S = 8  # with less left, a section is not begun
END_TIMEOUT_S = 3


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [section.name for section in SECTIONS]
    parser.add_argument("--out", type=Path, help="directory for results")
    parser.add_argument("--sections", nargs="+", choices=names, default=names, metavar="NAME", help="some only")
    parser.add_argument("--wheels", type=Path, help="directory with wheels of packages that are not installed")
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for everything together")
    parser.add_argument("--rehearse", action="store_true", help="try the code on a CPU; the figures mean nothing")
    parser.add_argument("--list", action="store_true", help="name the sections and end")
    options = parser.parse_args(arguments)
    if options.out is None and not options.list:
        parser.error("--out is needed")
    return options


def main(arguments: list[str]) -> int:
    options = parsed(arguments)
    if options.list:
        print("\n".join(f"{s.name:<22} {s.deadline_s:>4.0f} s  {s.what}" for s in SECTIONS))
        return 0
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-once-packages-") as directory:
        if options.wheels is not None:
            print("carried:", *packages.unpack(options.wheels, Path(directory)))
            sys.path.append(directory)
        results = run_all(options, directory)
    (options.out / "results.json").write_text(json.dumps(results, indent=1))
    text = table(results)
    (options.out / "table.txt").write_text(text + "\n")
    print(text)
    return int(any(result["status"].startswith("failed") for result in results.values()))


def run_all(options: argparse.Namespace, directory: str) -> dict[str, dict[str, Any]]:
    """The sections one after the other; each result has a status."""
    device = "cpu" if options.rehearse else "cuda"
    deadline = time.monotonic() + options.budget
    no_device = "" if options.rehearse else why_no_gpu()
    results: dict[str, dict[str, Any]] = {}
    for section in SECTIONS:
        if section.name not in options.sections:
            continue
        left = deadline - time.monotonic()
        reason = no_device or lacking(section, device) or ("the time is up" if left < LEAST_S else "")
        if reason:
            results[section.name] = {"status": f"skipped: {reason}"}
        else:
            results[section.name] = run_one(section, options, device, min(section.deadline_s, left), directory)
        print(f"── {section.name}: {results[section.name]['status']}", flush=True)
    return results


def why_no_gpu() -> str:
    """Why nothing can run here, or an empty string."""
    try:
        import torch
    except ImportError:
        return "torch is not installed"
    return "" if torch.cuda.is_available() else "no CUDA device is at hand"


def lacking(section: Section, device: str) -> str:
    needs = section.needs + (section.on_gpu if device == "cuda" else ())
    names = packages.missing(needs)
    return f"not installed: {', '.join(names)}" if names else ""


def run_one(
    section: Section, options: argparse.Namespace, device: str, seconds: float, directory: str
) -> dict[str, Any]:
    """Run a section in a process group of its own, and end the whole group at its deadline."""
    kind = "rehearsal" if options.rehearse else "real"
    command = [sys.executable, "-m", "deploy.benchmarks.gpu.section", section.name, str(options.out), device, kind]
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"), directory)))
    environment = {**os.environ, "PYTHONPATH": path, "OMP_WAIT_POLICY": "PASSIVE"}
    found = options.out / f"{section.name}.json"
    found.unlink(missing_ok=True)
    with (options.out / f"{section.name}.log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            code = process.wait(seconds)
            status = "complete" if code == 0 else f"failed with {code}: see {section.name}.log"
        except subprocess.TimeoutExpired:
            status = f"ended at its deadline of {seconds:.0f} s"
        finally:
            end(process)
    result: dict[str, Any] = json.loads(found.read_text()) if found.exists() else {}
    return {**result, "status": status}


def end(process: "subprocess.Popen[bytes]") -> None:
    """End what is left of a section's processes."""
    for signal_number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, signal_number)
        except ProcessLookupError:
            return
        try:
            process.wait(END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            continue


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
