"""Responses that are kept for later requests: a bounded SQLite file, which outlasts the gateway's process.

A response is kept with the items of its own request, and the id of the one before it: a conversation is a chain. What
was not used for longest goes first, so that a conversation that goes on stays whole.

Every method but `run` blocks. The event loop calls them by `run`, in a thread of the store's own: a disk that hangs, or
another server that holds the file, holds up nothing else.
"""

import asyncio
import os
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError, StartupError

FILE_NAME = "responses.sqlite"  # in the run directory
IN_MEMORY = ":memory:"
FORMAT = 1  # of the file, as its user_version
BUSY_TIMEOUT_S = 2.0  # that another server on the same file is waited for
MOST_WAITING_S = 10.0  # for the operations before
BUSY = "The store of responses is busy."
PREVIOUS = "previous_response_id"  # field of a request

Result = TypeVar("Result")

SCHEMA = """
CREATE TABLE IF NOT EXISTS responses (
    id TEXT PRIMARY KEY, previous TEXT, used_at REAL NOT NULL, size INTEGER NOT NULL, input BLOB NOT NULL,
    response BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS by_use ON responses (used_at);
CREATE TABLE IF NOT EXISTS total (bytes INTEGER NOT NULL);
INSERT INTO total SELECT 0 WHERE NOT EXISTS (SELECT * FROM total);
CREATE TRIGGER IF NOT EXISTS added AFTER INSERT ON responses BEGIN UPDATE total SET bytes = bytes + new.size; END;
CREATE TRIGGER IF NOT EXISTS removed AFTER DELETE ON responses BEGIN UPDATE total SET bytes = bytes - old.size; END;
"""
# Ends behind so many bytes: what is further back is not looked for, and links that lead in a circle have an end.
CHAIN = """
WITH RECURSIVE chain (id, previous, size, total, depth) AS (
    SELECT id, previous, size, size, 0 FROM responses WHERE id = ?
    UNION ALL
    SELECT earlier.id, earlier.previous, earlier.size, total + max(earlier.size, 1), depth + 1
    FROM chain JOIN responses AS earlier ON earlier.id = chain.previous
    WHERE total <= ?
)
SELECT id, previous, size FROM chain ORDER BY depth DESC
"""


class StoredResponse(NamedTuple):
    """JSON texts: the items of the request, as a list, and the response."""

    input: bytes
    response: bytes


class ResponseStore:
    """Keeps so many bytes of responses, and each for so many seconds after its last use."""

    def __init__(self, path: str, most_bytes: int, most_age_s: float, now: Callable[[], float] = time.time) -> None:
        """Raises StartupError where the file cannot be opened, naming the flag. `now`: seconds, as `time.time`."""
        self._most_bytes = most_bytes
        self._most_age_s = most_age_s
        self._now = now
        self._lock = threading.Lock()
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="responses")
        try:
            self._database = opened(path)
        except (OSError, sqlite3.Error) as error:
            raise StartupError(f"--responses-store: cannot open {path!r}: {error}") from None

    async def run(self, operation: Callable[..., Result], *arguments: Any) -> Result:
        """Call a function that uses the store, in the store's thread. Raises RequestError (503) where it comes late."""
        due = time.monotonic() + MOST_WAITING_S

        def call() -> Result:
            if time.monotonic() > due:
                raise RequestError(BUSY, Kind.UNAVAILABLE)
            return operation(*arguments)

        return await asyncio.get_running_loop().run_in_executor(self._thread, call)

    def put(self, response_id: str, previous: str | None, stored: StoredResponse) -> bool:
        """Keep a response, instead of one that has its id; what was not used for longest makes room.

        False, and nothing has changed, where it is larger than the store.
        """
        size = len(response_id) + len(stored.input) + len(stored.response)
        if size > self._most_bytes:
            return False
        with self._transaction() as database:
            row = (response_id, previous, self._now(), size, *stored)
            database.execute("DELETE FROM responses WHERE id = ?", (response_id,))
            database.execute("INSERT INTO responses VALUES (?, ?, ?, ?, ?, ?)", row)
            while database.execute("SELECT bytes FROM total").fetchone()[0] > self._most_bytes:
                database.execute("DELETE FROM responses WHERE id = (SELECT id FROM responses ORDER BY used_at LIMIT 1)")
        return True

    def get(self, response_id: str) -> StoredResponse | None:
        """A response and its input; None where it is not kept."""
        with self._transaction() as database:
            self._use(database, [response_id])
            return self._read(database, response_id)

    def conversation(self, response_id: str, most_bytes: int) -> list[StoredResponse] | None:
        """A response and those that it goes on from, the first one first; None where one of them is not kept.

        Raises RequestError (413) where they have more than `most_bytes` together.
        """
        with self._transaction() as database:
            chain = database.execute(CHAIN, (response_id, most_bytes)).fetchall()
            size = sum(link[2] for link in chain)
            if size > most_bytes:
                raise too_many_bytes("The conversation of the previous response has", size, most_bytes, PREVIOUS)
            if not chain or chain[0][1] is not None:
                return None
            self._use(database, [link[0] for link in chain])
            found = [self._read(database, link[0]) for link in chain]
            return [stored for stored in found if stored is not None]

    def several(self, response_ids: Sequence[str], most_bytes: int) -> list[StoredResponse]:
        """Those of the responses that are kept. Raises RequestError (413) where they have more than `most_bytes`."""
        with self._transaction() as database:
            size = 0
            for one in response_ids:
                row = database.execute("SELECT size FROM responses WHERE id = ?", (one,)).fetchone()
                size += row[0] if row else 0
            if size > most_bytes:
                raise too_many_bytes("The responses whose items are referred to have", size, most_bytes, "input")
            self._use(database, response_ids)
            found = [self._read(database, one) for one in response_ids]
            return [stored for stored in found if stored is not None]

    def delete(self, response_id: str) -> bool:
        """Forget a response; False where it is not kept. What goes on from it can no longer be gone on from."""
        with self._transaction() as database:
            return database.execute("DELETE FROM responses WHERE id = ?", (response_id,)).rowcount > 0

    def close(self) -> None:
        with self._lock:
            self._database.close()

    def _use(self, database: sqlite3.Connection, ids: Sequence[str]) -> None:
        now = self._now()
        database.executemany("UPDATE responses SET used_at = ? WHERE id = ?", [(now, one) for one in ids])

    def _read(self, database: sqlite3.Connection, response_id: str) -> StoredResponse | None:
        row = database.execute("SELECT input, response FROM responses WHERE id = ?", (response_id,)).fetchone()
        return None if row is None else StoredResponse(*row)

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        """The database, without what is too old. Raises RequestError (503) where it fails."""
        with self._lock:
            try:
                self._database.execute("BEGIN IMMEDIATE")
                oldest = self._now() - self._most_age_s
                self._database.execute("DELETE FROM responses WHERE used_at < ?", (oldest,))
                yield self._database
                self._database.execute("COMMIT")
            except sqlite3.Error as error:
                raise RequestError(f"The store of responses has failed: {error}", Kind.UNAVAILABLE) from error
            finally:
                with suppress(sqlite3.Error):  # it has failed before
                    self._database.rollback()


def too_many_bytes(what: str, size: int, most: int, field: str) -> RequestError:
    return RequestError(
        f"{what} {size} bytes, more than the limit of {most} bytes (--max-body-size).", Kind.TOO_LARGE, field
    )


def opened(path: str) -> sqlite3.Connection:
    """The database in this file; a new one is for its owner only. Raises OSError and sqlite3.Error."""
    if path != IN_MEMORY:
        os.close(os.open(path, os.O_RDWR | os.O_CREAT, 0o600))
    database = sqlite3.connect(path, timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False)
    found = database.execute("PRAGMA user_version").fetchone()[0]
    if found not in (0, FORMAT):
        raise sqlite3.DatabaseError(f"its format is {found}, this server knows {FORMAT}")
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = NORMAL")
    database.execute("PRAGMA secure_delete = ON")
    database.executescript(f"BEGIN IMMEDIATE; {SCHEMA} PRAGMA user_version = {FORMAT}; COMMIT;")
    return database


def store_of(config: ServerConfig, run_dir: str) -> ResponseStore:
    """The store that a server's settings describe; in memory where there is no run directory. Raises StartupError."""
    path = config.responses_store or (str(Path(run_dir) / FILE_NAME) if run_dir else IN_MEMORY)
    return ResponseStore(path, config.responses_store_size, config.responses_store_age)
