"""Starts the suites that need a process of their own: Triton's interpreter, its compiler, and a simulated GPU."""

import contextlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import pytest

ROOT = Path(__file__).resolve().parents[3]
SUITES = {
    "tests/kernels_interpreter": {"TRITON_INTERPRET": "1"},
    "tests/kernels_sm90": {"KERNEL_TARGET": "sm90"},
    "tests/simulated_gpu": {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "-p tests.simulated_gpu.plugin tests/gpu"},
}
SETTINGS = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}
LONGEST_S = 1800

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(LONGEST_S + 20),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.fixture(scope="module")
def started() -> Iterator[dict[str, tuple[subprocess.Popen[bytes], IO[Any]]]]:
    """All suites at once, since each uses one core; with the files that they print to."""
    with contextlib.ExitStack() as stack:
        running = {}
        for suite, environment in SUITES.items():
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            process = subprocess.Popen(
                [sys.executable, "-m", "pytest", suite, "-p", "no:cacheprovider"],
                cwd=ROOT,
                env={**os.environ, **SETTINGS, **environment},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            running[suite] = process, output
        yield running


@pytest.mark.parametrize("suite", SUITES)
def test_suite_passes_in_its_own_process(
    suite: str, started: dict[str, tuple[subprocess.Popen[bytes], IO[Any]]]
) -> None:
    process, output = started[suite]
    status = process.wait(LONGEST_S)
    output.seek(0)
    assert status == 0, output.read()[-8000:]
