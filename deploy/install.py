"""Installs Quartet into the environment of the Python that runs this: says how much it is, shows it, says what is next.

    .venv/bin/python deploy/install.py [--gpu auto|1|0] [--extras test,agents] [--torch-index URL]

`make` calls it. It needs nothing but Python, and leaves the work to pip, whose own settings stay in force.
"""

import argparse
import importlib.metadata
import os
import platform
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"  # PyPI's torch for Linux brings CUDA along
PROBE_TIMEOUT_S = 5
NVIDIA_SMI_TIMEOUT_S = 30
GPU_CHOICES = ("auto", "1", "0")
IMPORTS = ", ".join(
    f"quartet.{module}"
    for module in (
        "runtime.launcher.launch",
        "http_gateway.main",
        "tokenizer_service.main",
        "scheduler_service.main",
        "detokenizer_service.main",
    )
)
NOT_LINUX = (
    "Quartet's server needs Linux, and this is {}; run it in a container "
    "(docker build -f deploy/Dockerfile -t quartet .) or in a virtual machine with Linux"
)
UNREACHABLE = (
    "PyTorch's index of CPU builds cannot be reached ({}), so pip takes torch from where it is set up to; that may be\n"
    "the build for CUDA: 2.8 GB to download and 5.3 GB on disk. TORCH_INDEX=URL names another index."
)
STILL_CPU = (
    "pip took a torch without CUDA, since that is what its settings offer; name an index that has one:\n"
    "make GPU=1 TORCH_INDEX=https://download.pytorch.org/whl/cu128"
)
NO_COMPILER = (
    "There is no gcc here: bfloat16 models run without Quartet's own CPU kernels, which are faster than torch's.\n"
    "On Debian and Ubuntu: apt install gcc libc6-dev"
)


@dataclass(frozen=True)
class Size:
    """What an installation takes, in MB, measured on x86-64 Linux (docs/installation.md has the parts)."""

    download: int
    disk: int

    @property
    def words(self) -> str:
        return f"about {in_words(self.download)} to download, {in_words(self.disk)} on disk"


CPU, CUDA = Size(250, 1100), Size(2800, 5300)
EXTRAS = {"test": Size(450, 1800), "agents": Size(40, 250), "gpu": Size(0, 0)}  # triton comes with a torch for CUDA


@dataclass(frozen=True)
class Plan:
    """What is installed, and from where."""

    gpu: bool
    extras: tuple[str, ...]
    index: str | None  # beside those that pip knows
    why: str

    @property
    def size(self) -> Size:
        parts = [CUDA if self.gpu else CPU, *(EXTRAS[extra] for extra in self.extras)]
        return Size(sum(part.download for part in parts), sum(part.disk for part in parts))

    def pip_arguments(self) -> list[str]:
        """The arguments of pip: its progress is shown, so there is no --quiet. Bytecode: see `compile_used`."""
        project = str(ROOT) + (f"[{','.join(self.extras)}]" if self.extras else "")
        where = ["--extra-index-url", self.index] if self.index else []
        return ["install", "--no-compile", "-c", str(ROOT / "constraints.txt"), *where, "-e", project]


def plan(choice: str, extras: Sequence[str], index: str, reachable: Callable[[str], str]) -> tuple[Plan, str]:
    """What to install, and a warning, or "".

    `choice`: of GPU_CHOICES. `index`: an index of torch that was named; "": PyTorch's own for CPUs where there is no
    GPU. `reachable` gives the reason why an address cannot be reached, or "".
    """
    gpu = has_gpu() if choice == "auto" else choice == "1"
    why = {
        ("auto", True): "an NVIDIA GPU was found; GPU=0 installs for the CPU",
        ("auto", False): "no NVIDIA GPU was found; GPU=1 installs for one all the same",
    }.get((choice, gpu), f"GPU={choice}")
    extras = (*extras, "gpu") if gpu else tuple(extras)
    if index or gpu:
        return Plan(gpu, extras, index or None, why), ""
    refused = reachable(TORCH_CPU_INDEX)
    return Plan(gpu, extras, None if refused else TORCH_CPU_INDEX, why), UNREACHABLE.format(refused) if refused else ""


def has_gpu() -> bool:
    """Whether NVIDIA's driver lists a GPU."""
    if (command := shutil.which("nvidia-smi")) is None:
        return False
    try:
        listed = subprocess.run(
            [command, "-L"], capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return listed.returncode == 0 and "GPU " in listed.stdout


def unreachable(address: str) -> str:
    """Why an index cannot be reached; "" where it can. pip itself would try for minutes."""
    try:
        with urllib.request.urlopen(f"{address.rstrip('/')}/torch/", timeout=PROBE_TIMEOUT_S):
            return ""
    except (OSError, ValueError) as error:  # those of urllib and of TLS derive from OSError
        return " ".join(str(getattr(error, "reason", error)).split()) or type(error).__name__


def is_cpu_build() -> bool:
    """Whether torch is here, and in its build for CPUs: to pip it is the same version as that for CUDA."""
    try:
        return importlib.metadata.version("torch").endswith("+cpu")
    except importlib.metadata.PackageNotFoundError:
        return False


def is_installed() -> bool:
    """Whether an installation has ended here before: then little is left to fetch."""
    try:
        importlib.metadata.version("quartet-serve")
        importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def in_words(megabytes: float) -> str:
    return f"{megabytes / 1000:.1f} GB" if megabytes >= 1000 else f"{megabytes:.0f} MB"


def megabytes_in(directory: Path) -> float:
    """What the files of a directory take on disk."""
    return sum(file.lstat().st_blocks for file in directory.rglob("*")) * 512 / 1e6


def check_room(directory: Path, size: Size) -> str:
    """Why it does not fit on the disk; "" where it does."""
    free = shutil.disk_usage(directory).free / 1e6
    return (
        "" if free >= size.disk else f"{in_words(size.disk)} are needed in {directory}, and {in_words(free)} are free"
    )


def compile_used() -> None:
    """Have Python keep the bytecode of what a server imports. That of all packages would take 150 MB more.

    What cannot be imported is said by the start of a server.
    """
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    subprocess.run([sys.executable, "-c", f"import {IMPORTS}"], env=environment, capture_output=True, check=False)


def next_steps(directory: Path) -> str:
    """What a newcomer types next. `directory`: of the environment."""
    here = directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
    return f"""
    {here}/bin/quartet serve                              the embedded model, on port 30000
    {here}/bin/quartet serve Qwen/Qwen2.5-0.5B-Instruct   a hub id, a directory or a GGUF file
    {here}/bin/quartet --help
    . {here}/bin/activate                                 then `quartet` alone is enough
"""


def say(text: str) -> None:
    print(text, flush=True)  # pip writes to the same stream


def main(arguments: Sequence[str] | None = None) -> int:
    """Install; returns the exit status."""
    parser = argparse.ArgumentParser(prog="install.py", description="Install Quartet into this Python's environment.")
    parser.add_argument("--gpu", choices=GPU_CHOICES, default="auto", help="torch for CUDA, and triton (default: auto)")
    parser.add_argument("--extras", default="", help="extras of the package, separated by commas")
    parser.add_argument("--torch-index", default="", help="package index to take torch from")
    given = parser.parse_args(arguments)
    if platform.system() != "Linux":
        return fail(NOT_LINUX.format(platform.system() or "an unknown system"))
    extras = tuple(extra for extra in given.extras.split(",") if extra)
    if unknown := set(extras) - set(EXTRAS):
        return fail(f"--extras takes {', '.join(EXTRAS)}, not {', '.join(sorted(unknown))}")
    chosen, warning = plan(given.gpu, extras, given.torch_index, unreachable)
    return install(chosen, warning)


def install(chosen: Plan, warning: str) -> int:
    """Carry a plan out, with everything said that a newcomer wants to know."""
    directory = Path(sys.prefix)
    kind = "an NVIDIA GPU" if chosen.gpu else "the CPU"
    say(f"Installing Quartet for {kind} ({chosen.why}) into {directory}.")
    if not is_installed():
        if refused := check_room(directory, chosen.size):
            return fail(refused)
        say(f"This is {chosen.size.words}. pip shows each package:\n")
    if warning:
        say(f"{warning}\n")
    if chosen.gpu and is_cpu_build():
        subprocess.run([sys.executable, "-m", "pip", "uninstall", "-y", "torch"], check=True)
    began = time.monotonic()
    if status := subprocess.run([sys.executable, "-m", "pip", *chosen.pip_arguments()], check=False).returncode:
        return fail(f"pip could not install it (status {status}); its message is above, and `make` tries again")
    compile_used()
    seconds = time.monotonic() - began
    say(f"\nInstalled in {seconds:.0f} s; {directory} takes {in_words(megabytes_in(directory))} now.")
    if chosen.gpu and is_cpu_build():
        say(STILL_CPU)
    if shutil.which("gcc") is None and shutil.which("cc") is None:
        say(NO_COMPILER)
    say(f"Next:\n{next_steps(directory)}")
    return 0


def fail(reason: str) -> int:
    print(f"install: {reason}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
