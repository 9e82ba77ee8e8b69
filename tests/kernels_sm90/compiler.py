"""A stand-in for the CUDA driver that launches nothing: Triton compiles for sm_90 and the binaries are kept.

The wrappers run as they do on a GPU, on tensors of the "meta" device, so what is inspected is what would be loaded.
"""

import re
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from triton.backends.compiler import GPUTarget
from triton.runtime import driver

SHARED_BYTES = 232_448  # of one block on sm_90
CUOBJDUMP = "backends/nvidia/bin/cuobjdump"


@dataclass(frozen=True, slots=True)
class Binary:
    """What one compiled kernel needs, and its instructions."""

    kernel: str
    registers: int
    stack: int
    shared: int
    code: str

    def count(self, instruction: str) -> int:
        return len(re.findall(rf"\b{instruction}\b", self.code))


class Recorder:
    """The part of the driver that Triton calls to load and start a kernel."""

    def __init__(self) -> None:
        self.loaded: list[tuple[str, bytes, int]] = []

    def load_binary(self, name: str, cubin: bytes, shared: int, device: int) -> tuple[int, int, int, int, int]:
        self.loaded.append((name, cubin, shared))
        return 0, 0, 0, 0, 1024  # module, function, registers, spills, most threads

    def unload_module(self, module: int) -> None: ...

    def get_device_properties(self, device: int) -> dict[str, int]:
        return {"max_shared_mem": SHARED_BYTES}

    def take(self) -> list[Binary]:
        """What was loaded since the last call, disassembled."""
        loaded, self.loaded = self.loaded, []
        return [inspect(*each) for each in loaded]


class NoLaunch:
    """In place of the compiled launcher."""

    def __init__(self, source: Any, metadata: Any) -> None: ...

    def __call__(self, *arguments: Any) -> None: ...


class CompileOnly:
    """The driver of an H100 or H200 that is not there."""

    launcher_cls = NoLaunch

    def __init__(self) -> None:
        self.utils = Recorder()

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


@cache
def use_compiler_only() -> Recorder:
    """Put the stand-in in the driver's place: one for the whole process."""
    stand_in = CompileOnly()
    driver.set_active(stand_in)  # type: ignore[arg-type]
    return stand_in.utils


def inspect(name: str, cubin: bytes, shared: int) -> Binary:
    import triton

    tool = Path(triton.__file__).parent / CUOBJDUMP
    with TemporaryDirectory() as directory:
        path = Path(directory) / "kernel.cubin"
        path.write_bytes(cubin)
        text = subprocess.run(
            [tool, "-res-usage", "-sass", path], capture_output=True, text=True, check=True, timeout=60
        ).stdout
    registers, stack = (int(re.search(rf"{key}:(\d+)", text).group(1)) for key in ("REG", "STACK"))  # type: ignore[union-attr]
    return Binary(name, registers, stack, shared, text)
