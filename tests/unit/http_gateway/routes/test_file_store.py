"""The store of files and batches: one server at a time has it, and what was half done is not found in it."""

import io
import sqlite3

import pytest

from quartet.http_gateway.routes import file_store
from quartet.http_gateway.routes.file_store import FileStore, StoredFile
from quartet.runtime.errors import RequestError, StartupError


def store(tmp_path, most_bytes: int = 1000) -> FileStore:
    made = FileStore(str(tmp_path / "files"), most_bytes, now=lambda: 7.9)
    made.open()
    return made


def test_files_are_for_their_user_alone_and_outlast_the_server(tmp_path):
    first = store(tmp_path)
    kept = first.add(io.BytesIO(b"abc"), 3, "x.jsonl", "batch")
    assert kept == StoredFile(kept.id, 7, 3, "x.jsonl", "batch")
    first.close()
    second = store(tmp_path)
    assert second.file(kept.id) == kept
    path = second.path_of(kept.id)
    assert (path.read_bytes(), path.stat().st_mode & 0o777) == (b"abc", 0o600)
    assert second.directory.stat().st_mode & 0o777 == 0o700


class Clock:
    """Seconds that a test moves on."""

    def __init__(self, now: float = 1000.0) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(("keep_s", "most_age_s", "expires_at"), [(60, 100, 1060), (None, 100, 1100), (500, 100, 1100)])
def test_a_file_goes_at_its_time_and_gives_its_room_back(tmp_path, keep_s, most_age_s, expires_at):
    clock = Clock()
    files = FileStore(str(tmp_path / "store"), 10, most_age_s, clock)
    kept = files.add(io.BytesIO(b"abc"), 3, "x", "batch", keep_s)
    assert kept.expires_at == expires_at
    clock.now = expires_at - 0.5
    assert files.file(kept.id) == kept
    clock.now = expires_at
    assert (files.file(kept.id), files.files(None), files.room()) == (None, [], 10)
    assert not files.path_of(kept.id).exists()


def test_a_file_without_a_time_stays(tmp_path):
    clock = Clock()
    files = FileStore(str(tmp_path / "store"), 10, now=clock)
    kept = files.add(io.BytesIO(b"abc"), 3, "x", "batch")
    clock.now = 1e12
    assert kept.expires_at is None
    assert files.file(kept.id) == kept


def test_a_file_that_an_unfinished_batch_reads_stays_until_its_end(tmp_path):
    clock = Clock()
    files = FileStore(str(tmp_path / "store"), 1000, 100, clock)
    read = files.add(io.BytesIO(b"abc"), 3, "x", "batch")
    batch = b'{"input_file_id": "%s"}' % read.id.encode()
    files.put_batch("batch_1", batch, over=False)
    clock.now += 200
    assert files.file(read.id) == read
    files.put_batch("batch_1", batch, over=True)
    assert files.file(read.id) is None


def test_a_batch_is_forgotten_an_age_after_its_end_and_never_before(tmp_path):
    clock = Clock()
    files = FileStore(str(tmp_path / "store"), 1000, 100, clock)
    files.put_batch("batch_1", b"{}", over=False)
    clock.now += 500
    assert files.batch("batch_1") == b"{}"
    files.put_batch("batch_1", b"ended", over=True)
    clock.now += 99
    assert files.batch("batch_1") == b"ended"
    clock.now += 1
    assert (files.batch("batch_1"), files.batches()) == (None, [])


def test_a_store_of_the_format_before_keeps_its_files_and_counts_its_batches_from_now_on(tmp_path):
    directory = tmp_path / "store"
    directory.mkdir()
    (directory / "file-1").write_bytes(b"abc")
    with sqlite3.connect(directory / file_store.DATABASE) as database:
        database.executescript(
            """
            CREATE TABLE files (id TEXT PRIMARY KEY, created_at INTEGER NOT NULL, bytes INTEGER NOT NULL,
                filename TEXT NOT NULL, purpose TEXT NOT NULL);
            CREATE TABLE batches (id TEXT PRIMARY KEY, over INTEGER NOT NULL, data BLOB NOT NULL);
            INSERT INTO files VALUES ('file-1', 7, 3, 'x', 'batch');
            INSERT INTO batches VALUES ('batch_1', 1, x'7b7d');
            PRAGMA user_version = 1;
            """
        )
    database.close()
    files = FileStore(str(directory), 1000, 100)
    assert files.files(None) == [StoredFile("file-1", 7, 3, "x", "batch", None)]
    assert files.batch("batch_1") == b"{}"
    new = files.add(io.BytesIO(b"d"), 1, "y", "batch")
    assert files.file(new.id) == new and new.expires_at is not None


def test_two_servers_cannot_have_one_store(tmp_path):
    first = store(tmp_path)
    with pytest.raises(StartupError, match="--files-store: another server uses"):
        store(tmp_path)
    first.close()
    store(tmp_path)


def test_a_place_that_cannot_be_used_is_refused_with_the_flag(tmp_path):
    (tmp_path / "files").write_text("")
    with pytest.raises(StartupError, match="--files-store: cannot use"):
        store(tmp_path)


def test_a_file_without_room_is_refused_and_room_comes_back_with_a_deletion(tmp_path):
    files = store(tmp_path, most_bytes=5)
    kept = files.add(io.BytesIO(b"abc"), 3, "x", "batch")
    with pytest.raises(RequestError, match="no room for 3 bytes more"):
        files.add(io.BytesIO(b"abc"), 3, "x", "batch")
    assert files.room() == 2
    assert files.delete(kept.id) and not files.delete(kept.id)
    assert files.room() == 5
    assert not files.path_of(kept.id).exists()


def test_what_a_dead_server_left_half_done_is_removed_and_what_runs_is_kept(tmp_path):
    first = store(tmp_path)
    first.put_batch("batch_1", b"{}", over=False)
    first.put_batch("batch_2", b"{}", over=True)
    for left in ("file-unknown", "batch_1.partial", "batch_2.partial"):
        (first.directory / left).touch()
    first.close()
    second = store(tmp_path)
    assert {path.name for path in second.directory.iterdir()} >= {"batch_1.partial"}
    assert not second.path_of("file-unknown").exists()
    assert not second.partial_of("batch_2").exists()


def test_the_end_of_a_batch_and_its_files_are_kept_in_one_step(tmp_path):
    files = store(tmp_path)
    made = StoredFile("file-1", 1, 2, "out", "batch_output")
    files.put_batch("batch_1", b"begun", over=False)
    files.put_batch("batch_1", b"ended", over=True, made=[made])
    assert files.batch("batch_1") == b"ended"
    assert (files.batches(), files.batches(unfinished=True)) == ([b"ended"], [])
    assert files.files("batch_output") == files.files(None) == [made]


def test_there_is_a_bound_on_the_number_of_files_and_of_batches_that_are_over(tmp_path, monkeypatch):
    monkeypatch.setattr(file_store, "MAX_FILES", 1)
    monkeypatch.setattr(file_store, "MAX_BATCHES", 2)
    files = store(tmp_path)
    files.add(io.BytesIO(b""), 0, "x", "batch")
    with pytest.raises(RequestError, match="has 1 files: delete some"):
        files.add(io.BytesIO(b""), 0, "x", "batch")
    for number in range(5):
        files.put_batch(f"batch_{number}", b"%d" % number, over=number > 0)
    assert files.batches() == [b"0", b"3", b"4"]


def test_what_is_known_of_batches_has_the_room_that_files_leave(tmp_path, monkeypatch):
    monkeypatch.setattr(file_store, "MAX_UNFINISHED_BATCHES", 1)
    files = FileStore(str(tmp_path / "store"), 100)
    for number in range(5):
        files.put_batch(f"batch_{number}", b"%d" % number * 20, over=number > 0)
    files.add(io.BytesIO(b"x" * 50), 50, "x", "batch")
    assert files.batches() == [b"0" * 20, b"3" * 20, b"4" * 20]


def test_the_newest_batches_are_known_in_a_full_store_too(tmp_path, monkeypatch):
    monkeypatch.setattr(file_store, "MAX_UNFINISHED_BATCHES", 2)
    files = FileStore(str(tmp_path / "store"), 10)
    files.add(io.BytesIO(b"x" * 10), 10, "x", "batch")
    for number in range(4):
        files.put_batch(f"batch_{number}", b"%d" % number, over=True)
    assert files.batches() == [b"2", b"3"]


def test_a_store_without_a_directory_is_for_one_process_and_leaves_nothing():
    files = FileStore(None, 10)
    files.add(io.BytesIO(b"a"), 1, "x", "batch")
    directory = files.directory
    files.close()
    assert not directory.exists()
