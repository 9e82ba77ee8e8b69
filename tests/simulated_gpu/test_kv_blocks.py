"""Blocks of KV in page-locked memory, whose copies from the device arrive later."""

import torch

from quartet.scheduler_service.execution.kv_blocks import MemoryBlocks

SIZE = 64


def row(value: int, device: str) -> torch.Tensor:
    return torch.full((SIZE,), value, dtype=torch.uint8, device=device)


def test_a_row_of_the_host_outlasts_a_copy_to_its_place_that_is_under_way() -> None:
    blocks = MemoryBlocks(1, SIZE, torch.device("cuda"))
    blocks.put(b"first", row(1, "cuda"))
    blocks.drop(b"first")
    blocks.put(b"second", row(2, "cpu"))
    assert torch.equal(blocks.get(b"second"), row(2, "cpu"))


def test_a_row_of_the_device_takes_the_place_of_one_that_is_under_way() -> None:
    blocks = MemoryBlocks(1, SIZE, torch.device("cuda"))
    blocks.put(b"first", row(1, "cuda"))
    blocks.clear()
    blocks.put(b"second", row(2, "cuda"))
    assert torch.equal(blocks.get(b"second"), row(2, "cpu"))
