"""Memory that is touched ahead, in pieces, and given back."""

from pathlib import Path

from quartet.scheduler_service.host import memory as host_memory


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * host_memory.PAGE_BYTES


def test_the_worker_breathes_after_each_piece_of_each_size() -> None:
    breaths: list[None] = []
    host_memory.warm([2 * host_memory.PIECE_BYTES, 1, 0], lambda: breaths.append(None))
    assert len(breaths) == 3


def test_all_pages_are_backed_while_it_lasts() -> None:
    before, most = resident_bytes(), 0

    def look() -> None:
        nonlocal most
        most = max(most, resident_bytes())

    size = 64 * host_memory.PIECE_BYTES
    host_memory.warm([size], look)
    assert most - before > size // 2
