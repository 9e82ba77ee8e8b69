"""What fewer bits cost: perplexity and KL divergence of servers and of llama.cpp's files to the unquantised model.

    python -m deploy.benchmarks.quantization --model DIR|FILE.gguf \\
        --servers "bf16=--dtype bfloat16" "int8=--quantization int8" \\
        "q4_k_m=--model-path X.gguf" [--windows 16] [--llama-bin DIR] [--llama-base F16.gguf] \\
        [--llama-files Q8_0.gguf …] [--out result.json]

A server is a name and its flags; it serves --model unless they name another one. All have to have the same tokens. The
reference is transformers' float32 model of --model, with the blocks of a GGUF file expanded. What is measured, and on
which text, `deploy.benchmarks.fidelity` says.

--llama-bin names a directory with llama-perplexity and llama-quantize. They score the same windows of the same text;
their reference is an F16 file, --llama-base, or the one that llama-quantize makes of a GGUF --model. Without
--llama-files it also makes Q8_0 and Q4_K_M files of that. What is not there is named and left out.
"""

import argparse
import json
import platform
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from deploy.benchmarks import fidelity
from deploy.benchmarks.serve_vs_transformers import machine
from tests.servers import launched

FLAGS = ("--max-total-tokens", "8192", "--disable-standby", "--skip-server-warmup", "--log-level", "warning")
READY_S = 300
LLAMA_TIMEOUT_S = 3600
LLAMA_TYPES = ("Q8_0", "Q4_K_M")
LLAMA_FIGURES = {  # what llama-perplexity prints
    "perplexity": r"Mean PPL\(Q\)\s*:\s*([\d.]+)",
    "perplexity_ratio": r"Mean PPL\(Q\)/PPL\(base\)\s*:\s*([\d.]+)",
    "kl_mean": r"Mean\s+KLD:\s*(-?[\d.]+)",
    "kl_p99": r"99\.0%\s+KLD:\s*(-?[\d.]+)",
    "same_best": r"Same top p:\s*([\d.]+)",  # per cent
}

Figures = dict[str, float]


def server_rows(model: str, servers: dict[str, str], count: int) -> dict[str, Figures]:
    """Name → figures of each server; one runs at a time, and transformers before the first is compared."""
    served: dict[str, fidelity.Scores] = {}
    windows: list[list[int]] = []
    for name, flags in servers.items():
        own = shlex.split(flags)
        chosen = () if "--model-path" in own else ("--model-path", model)
        with launched(*chosen, *FLAGS, *own, ready=False) as server:
            server.wait_for("Ctrl-C stops it.", READY_S)
            its = fidelity.windows_of(server.url, count)
            windows = windows or its
            if its != windows:
                raise SystemExit(f"{name} has other tokens than the servers before it")
            served[name] = fidelity.of_server(server.url, windows)
        print(f"  {name}: perplexity {served[name].perplexity:.4f}", flush=True)
    if not served:
        return {}
    reference = fidelity.of_transformers(fidelity.expanded(Path(model)), windows)
    rows = {"transformers float32": asdict(fidelity.divergence(reference, reference))}
    return rows | {name: asdict(fidelity.divergence(reference, scores)) for name, scores in served.items()}


def llama_rows(model: Path, binaries: Path, base: Path | None, files: list[Path], count: int) -> dict[str, Figures]:
    """Name → figures of each file, by llama-perplexity."""
    perplexity, quantize = binaries / "llama-perplexity", binaries / "llama-quantize"
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        if base is None:
            if model.suffix != ".gguf":
                raise SystemExit("a model directory needs --llama-base, its F16 GGUF file")
            base = work / "base-F16.gguf"
            run(quantize, "--allow-requantize", model, base, "F16")
        if not files:
            files = [work / f"{kind}.gguf" for kind in LLAMA_TYPES]
            for file in files:
                run(quantize, base, file, file.stem)
            files += [model] if model.suffix == ".gguf" else []
        text, logits = work / "text.txt", work / "logits"
        text.write_text(fidelity.text())
        common = ("-f", text, "-c", fidelity.WINDOW, "--chunks", count, "--kl-divergence-base", logits)
        run(perplexity, "-m", base, *common)
        printed = {file.stem: run(perplexity, "-m", file, *common, "--kl-divergence") for file in files}
    return {f"llama.cpp {name}": figures_in(text) for name, text in printed.items()}


def run(*command: object) -> str:
    """What a program prints; ends this one where it fails."""
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, timeout=LLAMA_TIMEOUT_S)
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}: {done.stderr[-600:]}")
    return done.stdout + done.stderr


def figures_in(printed: str) -> Figures:
    """The figures of a file in llama-perplexity's output; one that it does not print is missing here too."""
    found = {name: re.search(pattern, printed) for name, pattern in LLAMA_FIGURES.items()}
    figures = {name: float(match[1]) for name, match in found.items() if match}
    if "same_best" in figures:
        figures["same_best"] /= 100
    return figures


def table(rows: dict[str, Figures]) -> str:
    columns = {"perplexity": ".4f", "perplexity_ratio": ".5f", "kl_mean": ".5f", "kl_p99": ".4f", "same_best": ".4f"}
    lines = [f"{'':28}" + "".join(f"{name:>18}" for name in columns)]
    for name, row in rows.items():
        cells = [format(row[column], form) if column in row else "-" for column, form in columns.items()]
        lines.append(f"{name[:27]:28}" + "".join(f"{cell:>18}" for cell in cells))
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--servers", nargs="*", default=["default="], help="NAME=FLAGS")
    parser.add_argument("--windows", type=int, default=16)
    parser.add_argument("--llama-bin", type=Path)
    parser.add_argument("--llama-base", type=Path)
    parser.add_argument("--llama-files", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    servers = dict(spec.split("=", 1) for spec in given.servers)
    rows = server_rows(str(given.model), servers, given.windows)
    if given.llama_bin and (given.llama_bin / "llama-perplexity").is_file():
        rows |= llama_rows(given.model, given.llama_bin, given.llama_base, given.llama_files, given.windows)
    else:
        print("llama.cpp: --llama-bin names no directory with llama-perplexity; left out")
    about: dict[str, Any] = machine() | {"text": f"docstrings of Python {platform.python_version()}"}
    print(f"{given.model}, {given.windows} windows of {fidelity.WINDOW} tokens; {about['text']}; {about['cpu']}")
    print(table(rows))
    if given.out:
        given.out.write_text(json.dumps({"machine": about, "windows": given.windows, "rows": rows}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
