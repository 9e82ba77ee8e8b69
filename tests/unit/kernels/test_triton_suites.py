"""Starts the suites that need a process of their own: Triton's interpreter, its compiler, and a simulated GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
SUITES = {
    "tests/kernels_interpreter": {"TRITON_INTERPRET": "1"},
    "tests/kernels_sm90": {"KERNEL_TARGET": "sm90"},
    "tests/simulated_gpu": {"TRITON_INTERPRET": "1", "PYTEST_ADDOPTS": "-p tests.simulated_gpu.plugin tests/gpu"},
}
SETTINGS = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("suite", SUITES)
def test_suite_passes_in_its_own_process(suite: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", suite, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, **SUITES[suite]},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
