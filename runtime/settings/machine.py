"""The facts of this machine that defaults depend on."""

import importlib.util
import os
import re
from pathlib import Path

import msgspec

RECORDER_DIR = "/tmp"
RECORDER_DIR_VARIABLE = "SGLANG_EXPERT_DISTRIBUTION_RECORDER_DIR"


class Machine(msgspec.Struct, frozen=True):
    """What there is to run on, and where files go."""

    has_gpu: bool = False  # an NVIDIA driver is loaded
    torch_has_cuda: bool = False  # the installed torch can use it
    has_triton: bool = True  # which compiles the kernels of a GPU
    recorder_dir: str = RECORDER_DIR  # where recordings of experts go
    has_opentelemetry: bool = False  # the SDK and its exporter are installed


def look_at_machine() -> Machine:
    """Read the facts, without importing torch."""
    return Machine(
        has_gpu=Path("/proc/driver/nvidia/version").exists(),
        torch_has_cuda=torch_has_cuda(),
        has_triton=importlib.util.find_spec("triton") is not None,
        recorder_dir=os.environ.get(RECORDER_DIR_VARIABLE) or RECORDER_DIR,
        has_opentelemetry=has_opentelemetry(),
    )


def has_opentelemetry() -> bool:
    """Whether traces can be exported."""
    try:
        return all(map(importlib.util.find_spec, ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")))
    except ModuleNotFoundError:
        return False


def torch_has_cuda() -> bool:
    """Whether the installed torch was built for CUDA."""
    spec = importlib.util.find_spec("torch")
    if spec is None or spec.origin is None:
        return False
    version = Path(spec.origin).with_name("version.py")
    return version.is_file() and re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE) is not None
