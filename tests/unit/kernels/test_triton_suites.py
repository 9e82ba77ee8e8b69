"""Starts the two suites of Triton kernels that need a process of their own: the interpreter's and the compiler's."""

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
}
SETTINGS = {"TRITON_DEFAULT_FP_FUSION": "1", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE"}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed"),
]


@pytest.mark.parametrize("suite", SUITES)
def test_suite_of_kernels_passes_in_its_own_process(suite: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", suite, "-p", "no:cacheprovider"],
        cwd=ROOT,
        env={**os.environ, **SETTINGS, **SUITES[suite]},
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
