"""The device that a worker runs on: which one, its memory, and how many threads it is given."""

import os

import torch

ONE_THREAD_HIDDEN_SIZE = 384


def choose_device(name: str) -> torch.device:
    """The device of --device; `auto` takes a GPU where there is one."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def limit_threads(device: torch.device, hidden_size: int) -> None:
    """Small models run on one thread: waking a second one takes longer than their matrix products."""
    if device.type == "cpu" and hidden_size <= ONE_THREAD_HIDDEN_SIZE:
        torch.set_num_threads(1)


def total_bytes(device: torch.device) -> int:
    """All memory of a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[1])
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
