"""Which number format a model is served in."""

import logging
from typing import Any

import pytest
import torch

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.model.dtype import resolve_dtype

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.mark.parametrize(
    ("flag", "config", "device", "expected"),
    [
        ("auto", {"torch_dtype": "bfloat16"}, CPU, torch.bfloat16),
        ("auto", {"dtype": "float16"}, CPU, torch.float16),
        ("auto", {"dtype": "float32"}, CPU, torch.float32),
        ("auto", {"torch_dtype": "torch.bfloat16"}, CUDA, torch.bfloat16),
        ("auto", {}, CPU, torch.float32),
        ("half", {"dtype": "float32"}, CPU, torch.float16),
        ("float", {"dtype": "bfloat16"}, CUDA, torch.float32),
    ],
)
def test_flag_wins_over_the_checkpoint(
    flag: str, config: dict[str, Any], device: torch.device, expected: torch.dtype
) -> None:
    assert resolve_dtype(flag, config, device) is expected


def test_float32_checkpoints_are_halved_on_a_gpu_and_that_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO):
        assert resolve_dtype("auto", {"dtype": "float32"}, CUDA) is torch.float16
    assert caplog.messages == ["Downcasting torch.float32 to torch.float16."]


@pytest.mark.parametrize(("flag", "config"), [("int8", {}), ("auto", {"dtype": "float8_e4m3fn"})])
def test_unknown_formats_are_refused(flag: str, config: dict[str, Any]) -> None:
    with pytest.raises(StartupError, match="--dtype"):
        resolve_dtype(flag, config, CPU)
