import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from quartet.runtime.errors import StartupError
from quartet.scheduler_service.host.block_files import HEADER_BYTES, BlockFiles, bytes_on_disk, drop_unused

SIZE = 1000
IDENTITY, OTHER = b"i" * 20, b"o" * 20
KEYS = [bytes([number]) * 20 for number in range(4)]
BLOCKS = [bytes([number + 50]) * SIZE for number in range(4)]
HOLDER = """
import sys
from pathlib import Path
from quartet.scheduler_service.host.block_files import BlockFiles
files = BlockFiles(Path(sys.argv[1]), 1000)
print("held", flush=True)
sys.stdin.readline()
"""
INTRUDER = """
import sys
from pathlib import Path
from quartet.scheduler_service.host.block_files import BlockFiles
BlockFiles(Path(sys.argv[1]), 1000, lock_wait_s=0)
"""


def error_of_another_server(directory: Path) -> str:
    """What a second process says that wants the directory too."""
    run = subprocess.run([sys.executable, "-c", INTRUDER, str(directory)], capture_output=True, text=True, check=False)
    return run.stderr


def opened(directory: Path, identity: bytes = IDENTITY) -> tuple[BlockFiles, list[bytes]]:
    files = BlockFiles(directory, SIZE, lock_wait_s=0)
    return files, files.begin(identity)


def read(files: BlockFiles, key: bytes) -> bytes | None:
    block = bytearray(SIZE)
    return bytes(block) if files.read(key, memoryview(block)) else None


def path(directory: Path, key: bytes, identity: bytes = IDENTITY) -> Path:
    return directory / identity.hex() / f"{key.hex()}.kv"


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    """With blocks 0 to 2, used in this order."""
    place = tmp_path / "kv" / "new"
    files, _ = opened(place)
    for number in range(3):
        files.write(KEYS[number], memoryview(BLOCKS[number]))
        os.utime(path(place, KEYS[number]), (number, number))
    os.close(files._lock)
    return place


def test_blocks_are_found_again_in_the_order_of_their_use(directory: Path) -> None:
    files, found = opened(directory)
    assert found == KEYS[:3]
    assert [read(files, key) for key in KEYS] == [*BLOCKS[:3], None]
    read(files, KEYS[0])
    assert opened(directory)[1][-1:] != KEYS[2:3] or path(directory, KEYS[0]).stat().st_mtime > 3


def test_a_file_takes_what_the_bound_counts(directory: Path) -> None:
    size = path(directory, KEYS[0]).stat().st_size
    assert size == HEADER_BYTES + SIZE and bytes_on_disk(SIZE) == 4096
    assert bytes_on_disk(4096 - HEADER_BYTES) == 4096 and bytes_on_disk(4097 - HEADER_BYTES) == 8192


def test_only_this_user_may_read_them(directory: Path) -> None:
    assert directory.stat().st_mode & 0o077 == 0
    assert path(directory, KEYS[0]).stat().st_mode & 0o077 == 0


def test_every_damaged_byte_is_noticed(directory: Path) -> None:
    files, _ = opened(directory)
    file = path(directory, KEYS[0])
    whole = file.read_bytes()
    for place in [*range(HEADER_BYTES), HEADER_BYTES + 1, len(whole) - 1]:
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert read(files, KEYS[0]) is None, place
    file.write_bytes(whole)
    assert read(files, KEYS[0]) == BLOCKS[0]


def test_a_file_under_another_name_or_identity_is_not_believed(directory: Path) -> None:
    files, _ = opened(directory)
    path(directory, KEYS[3]).write_bytes(path(directory, KEYS[0]).read_bytes())
    assert read(files, KEYS[3]) is None
    copy = path(directory, KEYS[0]).read_bytes()
    files.begin(OTHER)
    path(directory, KEYS[0], OTHER).write_bytes(copy)
    assert read(files, KEYS[0]) is None


def test_what_is_no_whole_regular_file_is_ignored_with_one_line(
    directory: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "outside").write_bytes(path(directory, KEYS[0]).read_bytes())
    path(directory, KEYS[0]).unlink()
    path(directory, KEYS[0]).symlink_to(tmp_path / "outside")
    path(directory, KEYS[1]).write_bytes(b"short")
    os.mkfifo(path(directory, KEYS[3]))
    (path(directory, b"x" * 20)).mkdir()
    (directory / IDENTITY.hex() / "notes.txt").write_text("mine")
    (directory / IDENTITY.hex() / f"{KEYS[3].hex()}.part").write_bytes(b"unfinished")
    with caplog.at_level(logging.WARNING):
        files, found = opened(directory)
    assert found == KEYS[2:3]
    assert len(caplog.messages) == 1 and "1 files were damaged and deleted, 4 ignored" in caplog.messages[0]
    assert [read(files, key) for key in (*KEYS, b"x" * 20)] == [None, None, BLOCKS[2], None, None]
    assert (tmp_path / "outside").exists() and (directory / IDENTITY.hex() / "notes.txt").exists()


def test_blocks_of_other_weights_are_deleted_and_nothing_else(directory: Path, tmp_path: Path) -> None:
    (directory / "mine").mkdir()
    (directory / "mine" / f"{KEYS[0].hex()}.kv").write_text("not ours")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / f"{KEYS[0].hex()}.kv").write_text("outside")
    (directory / ("e" * 40)).symlink_to(elsewhere)
    files, found = opened(directory, OTHER)
    assert found == [] and read(files, KEYS[0]) is None
    assert not (directory / IDENTITY.hex()).exists()
    assert (directory / "mine" / f"{KEYS[0].hex()}.kv").exists() and any(elsewhere.iterdir())


def test_forgetting_deletes_all_and_goes_on(directory: Path) -> None:
    files, _ = opened(directory)
    files.forget(IDENTITY)
    assert not any((directory / IDENTITY.hex()).iterdir())
    files.write(KEYS[0], memoryview(BLOCKS[0]))
    files.forget(OTHER)
    assert not (directory / IDENTITY.hex()).exists()
    files.write(KEYS[1], memoryview(BLOCKS[1]))
    assert opened(directory, OTHER)[1] == [KEYS[1]]


@pytest.mark.parametrize("deleted", ["all", "parent", "identity"])
def test_a_deleted_directory_is_made_again_with_the_next_block(
    directory: Path, caplog: pytest.LogCaptureFixture, deleted: str
) -> None:
    files, _ = opened(directory)
    shutil.rmtree({"all": directory, "parent": directory.parent, "identity": directory / IDENTITY.hex()}[deleted])
    assert read(files, KEYS[0]) is None
    files.delete(KEYS[0])
    files.write(KEYS[1], memoryview(BLOCKS[1]))
    files.write(KEYS[3], memoryview(BLOCKS[3]))
    assert [read(files, key) for key in KEYS] == [None, BLOCKS[1], None, BLOCKS[3]]
    assert directory.stat().st_mode & 0o077 == 0
    assert len(caplog.messages) == (deleted != "identity")
    assert f"in use by another server (process {os.getpid()})" in error_of_another_server(directory)


@pytest.mark.parametrize("identity", [IDENTITY, OTHER])
def test_forgetting_needs_no_directory(directory: Path, identity: bytes) -> None:
    files, _ = opened(directory)
    shutil.rmtree(directory)
    files.forget(identity)
    files.write(KEYS[0], memoryview(BLOCKS[0]))
    assert path(directory, KEYS[0], identity).exists() and read(files, KEYS[0]) == BLOCKS[0]


def test_a_directory_that_another_server_has_made_again_is_left_to_it(directory: Path) -> None:
    files, _ = opened(directory)
    shutil.rmtree(directory)
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as holder:
        assert holder.stdin is not None and holder.stdout is not None
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(OSError, match=f"in use by another server .process {holder.pid}"):
            files.write(KEYS[0], memoryview(BLOCKS[0]))
        holder.stdin.close()
    files.write(KEYS[0], memoryview(BLOCKS[0]))
    assert read(files, KEYS[0]) == BLOCKS[0]


def test_a_write_that_fails_leaves_nothing(directory: Path) -> None:
    files, _ = opened(directory)
    path(directory, KEYS[3]).mkdir()  # in the way of the file
    with pytest.raises(OSError):
        files.write(KEYS[3], memoryview(BLOCKS[3]))
    assert not list((directory / IDENTITY.hex()).glob("*.part"))


def test_a_pipe_in_the_way_of_a_file_holds_nobody_up(directory: Path) -> None:
    files, _ = opened(directory)
    os.mkfifo(path(directory, KEYS[3]).with_suffix(".part"))
    with pytest.raises(OSError):
        files.write(KEYS[3], memoryview(BLOCKS[3]))
    files.write(KEYS[3], memoryview(BLOCKS[3]))
    assert read(files, KEYS[3]) == BLOCKS[3]


def test_a_lock_that_is_no_file_is_said(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lock")
    with pytest.raises(StartupError, match="cannot be used: its lock is not a regular file"):
        BlockFiles(tmp_path, SIZE, lock_wait_s=0)


def test_one_process_at_a_time(directory: Path) -> None:
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(directory)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    with pytest.raises(StartupError, match=rf"in use by another server \(process {holder.pid}\)"):
        BlockFiles(directory, SIZE, lock_wait_s=0)
    drop_unused(directory)  # does nothing
    holder.kill()
    assert BlockFiles(directory, SIZE, lock_wait_s=10).begin(IDENTITY) == KEYS[:3], "the lock went with the process"
    holder.wait()


def test_a_directory_that_cannot_be_made_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StartupError, match=r"--kv-cache-dir .*file/kv cannot be used: Not a directory"):
        BlockFiles(tmp_path / "file" / "kv", SIZE)


def test_a_directory_that_others_may_write_to_is_warned_of(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    opened(tmp_path / "open")
    assert "can change what this server answers" in caplog.text


def test_blocks_of_ranks_that_are_no_more_are_deleted(directory: Path) -> None:
    others = [directory / name for name in ("rank1", "rank2", "rank12", "rankle")]
    for place in others:
        opened(place)[0].write(KEYS[0], memoryview(BLOCKS[0]))
    files, _ = opened(directory)
    files.drop_ranks(2)
    assert [path(place, KEYS[0]).exists() for place in others] == [True, False, False, True]
    assert read(files, KEYS[0]) == BLOCKS[0]


def test_a_directory_that_nobody_has_is_emptied_of_ours(directory: Path) -> None:
    for place in (directory, directory / "rank1"):
        opened(place)[0].write(KEYS[0], memoryview(BLOCKS[0]))
    (directory / "notes.kv").write_text("not ours")
    drop_unused(directory)
    assert [file.name for file in directory.rglob("*.kv")] == ["notes.kv"]


def test_a_directory_that_was_never_used_gets_no_lock(tmp_path: Path) -> None:
    drop_unused(tmp_path)
    assert not list(tmp_path.iterdir())
