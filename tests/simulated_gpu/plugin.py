"""A pytest plugin that puts the simulated device in the place of the one that is missing."""

import os

import pytest


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("the simulated device needs TRITON_INTERPRET=1 before triton is imported")
    from tests.simulated_gpu import cuda, launches

    cuda.install()
    launches.install()
