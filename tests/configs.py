"""Configurations as services read them."""

from typing import Any

from quartet.runtime.config import ResolvedConfig, ServerConfig
from quartet.runtime.settings.machine import Machine
from quartet.runtime.settings.resolve import resolve


def resolved(**settings: Any) -> ResolvedConfig:
    """These settings and the defaults of a machine with the device that they ask for, by default a CPU."""
    has_gpu = settings.get("device") == "cuda"
    return resolve(ServerConfig(**settings), Machine(has_gpu=has_gpu, torch_has_cuda=has_gpu)).config
