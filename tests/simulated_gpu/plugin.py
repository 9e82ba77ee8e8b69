"""A pytest plugin that puts the simulated device in the place of the one that is missing.

Tests run on the operations in plain torch, unless they are marked `interpreted`: the interpreter takes some 50 us for
each operation of each program of a kernel.
"""

import os

import pytest
import torch

SKIPPED = {  # part of a test's id → why
    "test_launches_ahead_of_their_inputs": "the interpreter knows no dependent launches",
    "test_deterministic_answers_have": "plain operations keep no order of sums",
    "test_kernel_agrees_at_served_shapes": "served shapes take the interpreter minutes",
    "torch.float16": "the interpreter's own suite compares what is stored in half precision",
    "torch.bfloat16": "the interpreter's own suite compares what is stored in half precision",
    "test_head_draws_from_the_logits_that_it_leaves": "the interpreter does not round to bfloat16",
}


def pytest_configure(config: pytest.Config) -> None:
    if os.environ.get("TRITON_INTERPRET") != "1":
        raise pytest.UsageError("the simulated device needs TRITON_INTERPRET=1 before triton is imported")
    if torch.cuda.is_available():
        pytest.exit("there is a GPU: its tests need no simulated one", returncode=0)
    config.addinivalue_line("markers", "interpreted: runs Triton's kernels on the simulated device")
    from tests.simulated_gpu import cuda, launches, plain_kernels

    cuda.install()
    launches.install()
    plain_kernels.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for part, reason in SKIPPED.items():
            if part in item.nodeid:
                item.add_marker(pytest.mark.skip(reason=reason))
        if "tests/gpu/test_kernels" in item.nodeid:
            item.add_marker(pytest.mark.interpreted)


@pytest.fixture(autouse=True)
def triton_kernels_where_they_are_asked_for(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.node.get_closest_marker("interpreted") is not None:
        from quartet.kernels import ops
        from tests.simulated_gpu import plain_kernels

        monkeypatch.setitem(ops.MODULES, "triton", plain_kernels.TRITON)
