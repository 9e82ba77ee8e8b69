"""Copies to a device and back without waiting for it.

A plain copy from the host to a GPU waits for all work submitted before, and two steps could not overlap. A copy through
page-locked memory is only queued. On a CPU nothing is copied at all.
"""

from collections.abc import Sequence
from typing import Any

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the host to `device`."""
    if device.type == "cpu":
        return tensor
    if device.type != "cuda":
        return tensor.to(device)
    # The caching host allocator keeps the page-locked block until the copy has been made.
    return tensor.pin_memory().to(device, non_blocking=True)


def upload(values: Sequence[Any], device: torch.device, dtype: torch.dtype | None = None) -> torch.Tensor:
    """Copy Python numbers to a tensor on `device`."""
    return send(torch.tensor(values, dtype=dtype), device)


def page_locked(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Memory of the host, with anything in it, from which `send` copies to a GPU without another copy before.

    Whoever writes there again must know that the copy has been made.
    """
    return torch.empty(shape, dtype=dtype, pin_memory=True)


def fetch(tensor: torch.Tensor) -> torch.Tensor:
    """Copy a tensor to the host; its values are valid once an Arrival made afterwards has been waited for."""
    if tensor.device.type == "cpu":
        return tensor
    host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
    return host.copy_(tensor, non_blocking=True)


class Arrival:
    """The moment when the device has done all work submitted so far."""

    def __init__(self, device: torch.device) -> None:
        self._event: torch.cuda.Event | None = None
        if device.type == "cuda":
            self._event = torch.cuda.Event()
            self._event.record(torch.cuda.current_stream(device))

    def wait(self) -> None:
        if self._event is not None:
            self._event.synchronize()
