"""The device that a worker runs on: its memory, and how many threads it is given."""

import torch

from quartet.runtime.process import memory
from quartet.runtime.process.memory import GB, Memory, in_words

ONE_THREAD_HIDDEN_SIZE = 384


def limit_threads(device: torch.device, hidden_size: int) -> None:
    """Small models run on one thread: waking a second one takes longer than their matrix products."""
    if device.type == "cpu" and hidden_size <= ONE_THREAD_HIDDEN_SIZE:
        torch.set_num_threads(1)


def look_at_memory(device: torch.device) -> Memory:
    """What may still be taken on a device, and what there is in all."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return Memory(int(free), int(total), "the device's memory")
    return memory.look()


def available_gb(device: torch.device) -> float:
    """Memory that can still be taken on a device."""
    return look_at_memory(device).available / GB


def shortage(wanted: int, device: torch.device) -> str:
    """Why so many bytes cannot be taken on a device, in words; empty where they can."""
    found = look_at_memory(device)
    if wanted <= found.available:
        return ""
    return f"{in_words(wanted)} are needed, and {in_words(found.available)} may still be used by {found.limit}"
