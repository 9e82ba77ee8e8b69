"""The files and batches of /v1/files and /v1/batches: a bounded directory, which outlasts the gateway's process.

The directory has the content of each file under its id, and a SQLite database with what is known of them. No file is
ever dropped to make room: a client deletes what it no longer needs, and each goes at its own time (`expires_at`), but
for one that an unfinished batch reads. What is known of batches that are over has the room that files leave; beyond
that, the oldest are forgotten, and each some time after its end. A directory that somebody deletes or moves away while
the server runs is made anew, and what was in it is gone.

Every method but `run` blocks. The event loop calls them by `run`, in a thread of the store's own.
"""

import asyncio
import fcntl
import logging
import os
import shutil
import sqlite3
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TypeVar

import msgspec

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError, StartupError
from quartet.runtime.limits import MAX_BATCHES, MAX_FILES, MAX_UNFINISHED_BATCHES

log = logging.getLogger(__name__)

DATABASE, LOCK = "files.sqlite", "lock"
FORMAT = 2  # of the database, as its user_version
PARTIAL = ".partial"  # results of a batch that is not over
FULL = (
    "The store of files has no room for {} bytes more: delete files, or start the server with more --files-store-size."
)

Result = TypeVar("Result")

SCHEMA = """
CREATE TABLE IF NOT EXISTS files (
    id TEXT PRIMARY KEY, created_at INTEGER NOT NULL, bytes INTEGER NOT NULL, filename TEXT NOT NULL,
    purpose TEXT NOT NULL, expires_at INTEGER
);
CREATE TABLE IF NOT EXISTS batches (
    id TEXT PRIMARY KEY, over INTEGER NOT NULL, data BLOB NOT NULL, changed_at INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX IF NOT EXISTS by_expiry ON files (expires_at);
CREATE INDEX IF NOT EXISTS by_change ON batches (over, changed_at);
"""
# Format 1 had no times: its files stay until they are deleted, its batches count from now on.
FROM_FORMAT_1 = """
ALTER TABLE files ADD COLUMN expires_at INTEGER;
ALTER TABLE batches ADD COLUMN changed_at INTEGER NOT NULL DEFAULT 0;
UPDATE batches SET changed_at = CAST(strftime('%s', 'now') AS INTEGER);
"""

PUT = """
INSERT INTO batches VALUES (?, ?, ?, ?) ON CONFLICT DO UPDATE SET over = ?2, data = ?3, changed_at = ?4
"""
NEWEST = "SELECT data FROM batches WHERE ?1 IS NULL OR rowid < ?1 ORDER BY rowid DESC LIMIT ?2"
FORGET = "DELETE FROM batches WHERE over AND rowid <= (SELECT max(rowid) FROM batches) - ?"
# The oldest that are over, beyond so many bytes. The newest stay in any case: somebody waits for their end.
TRIM = """
DELETE FROM batches WHERE rowid IN (
    SELECT rowid FROM (
        SELECT rowid, sum(length(data)) OVER newest AS kept, row_number() OVER newest AS place
        FROM batches WHERE over WINDOW newest AS (ORDER BY rowid DESC)
    ) WHERE kept > ? AND place > ?
)
"""


class StoredFile(NamedTuple):
    """What is known of a file."""

    id: str
    created_at: int
    bytes: int
    filename: str
    purpose: str
    expires_at: int | None = None


class Reading(msgspec.Struct):
    """Of a batch: which file it reads."""

    input_file_id: str = ""


class FileStore:
    """Keeps so many bytes of files, and the batches that use them, for so long."""

    def __init__(
        self, directory: str | None, most_bytes: int, most_age_s: float = 0, now: Callable[[], float] = time.time
    ) -> None:
        """`directory`: made when it is needed; None: one for this process alone. `most_age_s`: 0 is no limit.

        `now`: seconds, as `time.time`.
        """
        self._given = directory
        self.most_bytes = most_bytes
        self._most_age_s = most_age_s
        self._now = now
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="files")
        self._database: sqlite3.Connection | None = None
        self._file_bytes = 0  # of all files
        self._results: dict[str, int] = {}  # bytes of the results of running batches, by the batch's id
        self.directory = Path()
        self._owned = -1  # descriptor of the lock file
        self._inode = (0, 0)  # of the database: its device and number

    def open(self) -> None:
        """Take the directory. Raises StartupError where another server has it or it cannot be used, naming the flag."""
        with self._lock:
            self._opened()

    async def run(self, operation: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that uses the store, in the store's thread."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, operation, *arguments)

    def path_of(self, file_id: str) -> Path:
        return self.directory / file_id

    def partial_of(self, batch_id: str) -> Path:
        return self.directory / (batch_id + PARTIAL)

    def room(self) -> int:
        """Bytes that may still be kept."""
        with self._transaction() as database:
            return self.most_bytes - bytes_of_files(database) - sum(self._results.values())

    def reserve(self, batch_id: str, size: int) -> bool:
        """Whether the results of a running batch may have so many bytes in all; if so, they are its own until its end.

        Running batches share the room that files leave. Beyond a small share that each of them has for itself, the
        first to come has it. Raises RequestError (503) where the directory cannot be used any more.
        """
        with self._lock:
            self._found()
            room = self.most_bytes - self._file_bytes
            own = room // MAX_UNFINISHED_BATCHES
            if size > room - sum(max(own, taken) for other, taken in self._results.items() if other != batch_id):
                return False
            self._results[batch_id] = size
            return True

    def described(
        self, file_id: str, size: int, filename: str, purpose: str, keep_s: float | None = None
    ) -> StoredFile:
        """What is to be known of a file that is made now. `keep_s`: how long it is wanted, no longer than all are."""
        now = int(self._now())
        ages = [age for age in (keep_s, self._most_age_s) if age]
        return StoredFile(file_id, now, size, filename, purpose, now + int(min(ages)) if ages else None)

    def drop_expired(self) -> None:
        """Remove what has had its time, as every other operation does."""
        with self._transaction():
            pass

    def add(self, content: BinaryIO, size: int, filename: str, purpose: str, keep_s: float | None = None) -> StoredFile:
        """Keep a copy of a file, for `keep_s` at most. Raises RequestError: 413 without room, 503 of a full disk."""
        if size > self.room():
            raise RequestError(FULL.format(size), Kind.TOO_LARGE, "file")
        if len(self.files(None)) >= MAX_FILES:
            raise RequestError(f"The store of files has {MAX_FILES} files: delete some.", Kind.TOO_LARGE, "file")
        file = self.described(new_id("file"), size, filename, purpose, keep_s)
        path = self.path_of(file.id)
        try:
            with open(path, "xb", opener=private) as copy:
                shutil.copyfileobj(content, copy)
            with self._transaction() as database:
                insert(database, [file])
                self._trim(database)
        except OSError as error:
            path.unlink(missing_ok=True)
            raise RequestError(f"The file cannot be kept: {error.strerror}", Kind.UNAVAILABLE, "file") from error
        except BaseException:
            path.unlink(missing_ok=True)  # nobody would count it
            raise
        return file

    def file(self, file_id: str) -> StoredFile | None:
        """A file by its id; None where there is none."""
        with self._transaction() as database:
            row = database.execute("SELECT * FROM files WHERE id = ?", (file_id,)).fetchone()
            return None if row is None else StoredFile(*row)

    def content(self, file_id: str) -> BinaryIO | None:
        """A file's content, open: it can be read to its end, whoever deletes the file. None where there is none.

        Raises RequestError (503) where it cannot be read.
        """
        if self.file(file_id) is None:
            return None
        try:
            return open(self.path_of(file_id), "rb")
        except FileNotFoundError:  # somebody has deleted it in the directory
            return None
        except OSError as error:
            raise RequestError(f"The file cannot be read: {error.strerror}", Kind.UNAVAILABLE, "id") from error

    def files(self, purpose: str | None) -> list[StoredFile]:
        """All files of a purpose, the oldest first."""
        with self._transaction() as database:
            rows = database.execute("SELECT * FROM files WHERE coalesce(purpose = ?, 1) ORDER BY rowid", (purpose,))
            return [StoredFile(*row) for row in rows]

    def delete(self, file_id: str) -> bool:
        """Forget a file; False where there is none."""
        with self._transaction() as database:
            found = database.execute("DELETE FROM files WHERE id = ?", (file_id,)).rowcount > 0
        if found:
            self.path_of(file_id).unlink(missing_ok=True)
        return found

    def put_batch(self, batch_id: str, data: bytes, over: bool, made: Sequence[StoredFile] = ()) -> None:
        """Keep a batch as it is now and, in the same step, the files that it has made, whose content is there.

        Of batches that are over, the oldest are forgotten where there are too many or no room; their files stay.
        """
        with self._transaction() as database:
            row = (batch_id, over, data, int(self._now()))
            database.execute(PUT, row)
            insert(database, made)
            database.execute(FORGET, (MAX_BATCHES,))
            self._trim(database)
            if over:
                self._results.pop(batch_id, None)

    def batch(self, batch_id: str) -> bytes | None:
        """A batch by its id; None where there is none."""
        with self._transaction() as database:
            row = database.execute("SELECT data FROM batches WHERE id = ?", (batch_id,)).fetchone()
            return None if row is None else row[0]

    def batches(self, unfinished: bool = False) -> list[bytes]:
        """All batches, or those that are not over, the oldest first."""
        with self._transaction() as database:
            rows = database.execute("SELECT data FROM batches WHERE NOT over OR NOT ? ORDER BY rowid", (unfinished,))
            return [row[0] for row in rows]

    def newest_batches(self, count: int, after: str | None) -> list[bytes] | None:
        """So many batches, the newest first, behind the one with this id; None where there is no such one."""
        with self._transaction() as database:
            row = None
            if after is not None:
                row = database.execute("SELECT rowid FROM batches WHERE id = ?", (after,)).fetchone()
                if row is None:
                    return None
            return [found[0] for found in database.execute(NEWEST, (row and row[0], count))]

    def close(self) -> None:
        """Leave the directory to others; one that was for this process alone is removed."""
        with self._lock:
            if self._database is not None:
                self._leave()
                if self._given is None:
                    shutil.rmtree(self.directory, ignore_errors=True)

    def _trim(self, database: sqlite3.Connection) -> None:
        room = max(0, self.most_bytes - bytes_of_files(database))
        database.execute(TRIM, (room, MAX_UNFINISHED_BATCHES))

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The database. Raises RequestError (503) where it fails."""
        with self._lock:
            database = self._found()
            try:
                changes = database.total_changes
                database.execute("BEGIN IMMEDIATE")
                expired = self._expire(database)
                yield database
                database.execute("COMMIT")
                if database.total_changes != changes:
                    self._file_bytes = bytes_of_files(database)
                for file_id in expired:
                    self.path_of(file_id).unlink(missing_ok=True)
            except sqlite3.Error as error:
                raise RequestError(f"The store of files has failed: {error}", Kind.UNAVAILABLE) from error
            finally:
                with suppress(sqlite3.Error):  # it has failed before
                    database.rollback()

    def _expire(self, database: sqlite3.Connection) -> list[str]:
        """Forget what has had its time; the ids of files whose content is to be removed."""
        now = self._now()
        if self._most_age_s:
            database.execute("DELETE FROM batches WHERE over AND changed_at <= ?", (now - self._most_age_s,))
        expired = {row[0] for row in database.execute("SELECT id FROM files WHERE expires_at <= ?", (now,))}
        if expired:
            unfinished = database.execute("SELECT data FROM batches WHERE NOT over")
            expired -= {msgspec.json.decode(row[0], type=Reading).input_file_id for row in unfinished}
            database.executemany("DELETE FROM files WHERE id = ?", [(file_id,) for file_id in expired])
        return list(expired)

    def _found(self) -> sqlite3.Connection:
        """The database; a new one where the directory has gone. Raises RequestError (503) where it cannot be made."""
        if self._database is not None and inode_of(self.directory / DATABASE) != self._inode:
            log.error(
                "--files-store: %s was deleted or moved, with all files and batches. It is made anew.", self.directory
            )
            self._leave()
        try:
            return self._opened()
        except StartupError as error:
            raise RequestError(str(error), Kind.UNAVAILABLE) from error

    def _leave(self) -> None:
        """Let go of the directory."""
        if self._database is not None:
            with suppress(sqlite3.Error):  # its file may be gone
                self._database.close()
            self._database = None
        if self._owned >= 0:
            os.close(self._owned)
            self._owned = -1

    def _opened(self) -> sqlite3.Connection:
        if self._database is None:
            try:
                self.directory = Path(self._given or tempfile.mkdtemp(prefix="quartet-files-"))
                self.directory.mkdir(mode=0o700, parents=True, exist_ok=True)
                self._owned = os.open(self.directory / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
                fcntl.flock(self._owned, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._database = opened(self.directory / DATABASE)
                self._inode = inode_of(self.directory / DATABASE)
                self._sweep(self._database)
                self._file_bytes = bytes_of_files(self._database)
            except BlockingIOError:
                self._leave()
                raise StartupError(f"--files-store: another server uses {str(self.directory)!r}") from None
            except (OSError, sqlite3.Error) as error:
                self._leave()
                raise StartupError(f"--files-store: cannot use {str(self._given)!r}: {error}") from None
        return self._database

    def _sweep(self, database: sqlite3.Connection) -> None:
        """Remove what a server left behind that died between two steps."""
        known = {row[0] for row in database.execute("SELECT id FROM files")}
        running = {row[0] + PARTIAL for row in database.execute("SELECT id FROM batches WHERE NOT over")}
        for path in self.directory.iterdir():
            ours = path.name.startswith("file-") or path.name.endswith(PARTIAL)
            if ours and path.name not in known | running:
                path.unlink(missing_ok=True)


def opened(path: Path) -> sqlite3.Connection:
    """The database in this file; a new one is for its owner only. Raises OSError and sqlite3.Error."""
    os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, 1, FORMAT):
        raise sqlite3.DatabaseError(f"its format is {found}, this server knows {FORMAT}")
    database.execute("PRAGMA journal_mode = WAL")
    earlier = FROM_FORMAT_1 if found == 1 else ""
    database.executescript(f"BEGIN IMMEDIATE; {earlier} {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
    return database


def inode_of(path: Path) -> tuple[int, int]:
    """Device and number of a file; no file's where there is none."""
    try:
        found = path.stat()
    except OSError:
        return 0, 0
    return found.st_dev, found.st_ino


def bytes_of_files(database: sqlite3.Connection) -> int:
    return int(database.execute("SELECT coalesce(sum(bytes), 0) FROM files").fetchone()[0])


def insert(database: sqlite3.Connection, files: Sequence[StoredFile]) -> None:
    database.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?, ?)", files)


def private(path: str, mode: int) -> int:
    return os.open(path, mode, 0o600)


def new_id(kind: str) -> str:
    return f"{kind}-{uuid.uuid4().hex}" if kind == "file" else f"{kind}_{uuid.uuid4().hex}"


def file_store_of(config: ServerConfig, run_dir: str) -> FileStore:
    """The store that a server's settings describe: in the run directory unless a flag names another."""
    directory = config.files_store or (str(Path(run_dir) / "files") if run_dir else None)
    return FileStore(directory, config.files_store_size, config.files_store_age)
