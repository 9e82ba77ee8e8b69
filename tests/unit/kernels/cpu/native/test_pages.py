"""Advice about huge pages, as the system notes it."""

from pathlib import Path

import pytest
import torch

from quartet.kernels.cpu.native.pages import ADVICE, LEAST, in_huge_pages

SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
ADVISED = "hg"  # of the flags in smaps


def flags_at(address: int) -> list[str]:
    """Those of the mapping that holds an address."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef" and "-" in (span := line.split()[0]):
            begin, end = (int(part, 16) for part in span.split("-"))
            inside = begin <= address < end
        elif inside and line.startswith("VmFlags:"):
            return line.split()[1:]
    raise AssertionError(f"nothing is mapped at {address:x}")


@pytest.mark.skipif(ADVICE is None or not SETTING.exists(), reason="this system has no huge pages to choose")
def test_the_system_is_told_about_large_memory_from_its_first_to_its_last_byte():
    memory = torch.empty(3 * LEAST + 77, dtype=torch.uint8)
    assert in_huge_pages(memory) is memory
    for place in (0, LEAST, len(memory) - 1):
        assert ADVISED in flags_at(memory.data_ptr() + place), place
    memory.fill_(7)
    assert int(memory.sum()) == 7 * len(memory)


@pytest.mark.parametrize("size", [0, 1, LEAST - 1])
def test_small_memory_is_left_as_it_is(size):
    memory = torch.empty(size, dtype=torch.uint8)
    before = None if size < 1 << 12 else flags_at(memory.data_ptr())
    assert in_huge_pages(memory) is memory
    if before is not None:
        assert flags_at(memory.data_ptr()) == before
