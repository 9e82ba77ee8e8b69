import logging
import threading
from pathlib import Path

import pytest

from quartet.scheduler_service.host.block_files import BlockFiles
from quartet.scheduler_service.host.block_io import BlockIO, Read, Written

IDENTITY = b"i" * 20
KEYS = [bytes([number]) * 20 for number in range(3)]
BLOCKS = [bytes([number + 50]) * 100 for number in range(3)]


@pytest.fixture
def io(tmp_path: Path) -> BlockIO:
    files = BlockFiles(tmp_path, 100)
    files.begin(IDENTITY)
    return BlockIO(files)


def take(io: BlockIO, count: int) -> list[Written | Read]:
    """As many results as are to come."""
    return [io._results.get(timeout=60) for _ in range(count)]


def void(_: object) -> None:
    """For a lambda that returns nothing."""


def write(io: BlockIO, number: int) -> Written | Read:
    io.write(KEYS[number], number, memoryview(BLOCKS[number]), lambda: None)
    return take(io, 1)[0]


def test_blocks_come_back_side_by_side_up_to_the_first_that_is_missing(io: BlockIO) -> None:
    assert [write(io, number) for number in (0, 1)] == [Written(KEYS[0], 0, True), Written(KEYS[1], 1, True)]
    io.read(7, KEYS)
    (result,) = take(io, 1)
    assert isinstance(result, Read)
    assert (result.number, result.good, result.damaged) == (7, KEYS[:2], KEYS[2])
    assert result.data[:200] == BLOCKS[0] + BLOCKS[1]


def test_a_read_for_which_there_is_no_memory_ends_too(io: BlockIO) -> None:
    write(io, 0)
    io.files.block_bytes = 1 << 62
    io.read(7, KEYS)
    assert take(io, 1) == [Read(7, [], bytearray(), KEYS[0])]
    io.files.block_bytes = 100
    io.read(8, KEYS[:1])
    assert take(io, 1) == [Read(8, KEYS[:1], bytearray(BLOCKS[0]), None)]


def test_a_read_does_not_wait_for_a_write(io: BlockIO) -> None:
    write(io, 0)
    arrived = threading.Event()
    io.write(KEYS[1], 1, memoryview(BLOCKS[1]), lambda: void(arrived.wait(60)))
    io.read(1, KEYS[:1])
    assert isinstance(take(io, 1)[0], Read)
    arrived.set()
    assert take(io, 1) == [Written(KEYS[1], 1, True)]


def test_a_block_is_deleted_behind_its_write(io: BlockIO) -> None:
    io.write(KEYS[0], 0, memoryview(BLOCKS[0]), lambda: None)
    io.delete(KEYS[0])
    io.write(KEYS[1], 1, memoryview(BLOCKS[1]), lambda: None)
    take(io, 2)
    assert not io.files.read(KEYS[0], memoryview(bytearray(100)))


def test_a_disk_that_refuses_is_said_once(io: BlockIO, caplog: pytest.LogCaptureFixture) -> None:
    def full(key: bytes, block: memoryview) -> None:
        raise OSError(28, "No space left on device")

    whole, io.files.write = io.files.write, full  # type: ignore[method-assign]
    with caplog.at_level(logging.ERROR):
        results = [write(io, number) for number in range(3)]
    assert [result.ok for result in results if isinstance(result, Written)] == [False, False, False]
    assert len(caplog.messages) == 1 and caplog.messages[0].endswith("No space left on device")
    io.files.write = whole  # type: ignore[method-assign]
    assert write(io, 0) == Written(KEYS[0], 0, True)


def test_a_job_that_fails_in_another_way_does_not_end_the_thread(io: BlockIO) -> None:
    io.write(KEYS[0], 0, memoryview(BLOCKS[0]), lambda: void(1 // 0))
    assert take(io, 1) == [Written(KEYS[0], 0, False)]
    assert write(io, 0) == Written(KEYS[0], 0, True)


def test_a_directory_that_takes_no_change_is_said_once(io: BlockIO, caplog: pytest.LogCaptureFixture) -> None:
    for key in KEYS[:2]:
        (io.files.directory / IDENTITY.hex() / f"{key.hex()}.kv").mkdir()
        io.delete(key)
    assert write(io, 2) == Written(KEYS[2], 2, True)
    assert [record.levelname for record in caplog.records] == ["ERROR"] and "No KV can be kept" in caplog.text
