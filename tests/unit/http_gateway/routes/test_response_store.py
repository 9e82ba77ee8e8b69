"""The store of responses: conversations, its bounds in bytes and age, its file."""

import asyncio
import sqlite3
import stat
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from quartet.http_gateway.routes import response_store
from quartet.http_gateway.routes.response_store import ResponseStore, StoredResponse
from quartet.runtime.errors import Kind, RequestError, StartupError
from tests.unit.http_gateway.harness import asynchronous

AGE_S = 100.0


class Clock:
    """Seconds that pass when the test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        self.now += 0.001
        return self.now


def response(name: str, size: int = 10) -> StoredResponse:
    return StoredResponse(b"[]", name.encode().ljust(size, b"."))


def store_in(path: Path, most_bytes: int = 1 << 20, clock: Clock | None = None) -> ResponseStore:
    return ResponseStore(str(path / "s.sqlite"), most_bytes, AGE_S, clock or Clock())


def test_a_conversation_is_read_in_its_order(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for name, previous in (("a", None), ("b", "a"), ("c", "b"), ("other", "a")):
        assert store.put(name, previous, response(name))
    assert store.conversation("c", 1000) == [response("a"), response("b"), response("c")]
    assert store.conversation("other", 1000) == [response("a"), response("other")]
    assert store.conversation("none", 1000) is None


def test_a_conversation_without_its_beginning_is_not_there(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.put("a", None, response("a"))
    store.put("b", "a", response("b"))
    assert store.delete("a") and not store.delete("a")
    assert store.conversation("b", 1000) is None and store.get("b") == response("b")


def test_a_conversation_that_is_too_long_is_refused(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.put("a", None, response("a", 400))
    store.put("b", "a", response("b", 400))
    assert store.conversation("a", 500)
    with pytest.raises(RequestError) as error:
        store.conversation("b", 500)
    assert (error.value.kind.status, error.value.field) == (413, "previous_response_id")


def test_several_responses_are_read_at_once_and_used(tmp_path: Path) -> None:
    store = store_in(tmp_path, most_bytes=1000)
    store.put("a", None, response("a", 400))
    store.put("b", None, response("b", 400))
    assert store.several(["a", "none"], 500) == [response("a", 400)] and store.several([], 0) == []
    with pytest.raises(RequestError) as error:
        store.several(["a", "b"], 500)
    assert (error.value.kind.status, error.value.field) == (413, "input")
    store.put("c", None, response("c", 400))
    assert store.get("a") is not None and store.get("b") is None


def test_what_was_not_used_for_longest_makes_room(tmp_path: Path) -> None:
    store = store_in(tmp_path, most_bytes=1000)
    for name in "abc":
        store.put(name, None, response(name, 300))
    store.get("a")
    store.put("d", None, response("d", 300))
    assert [store.get(name) is not None for name in "abcd"] == [True, False, True, True]


def test_a_conversation_that_goes_on_is_used_as_a_whole(tmp_path: Path) -> None:
    store = store_in(tmp_path, most_bytes=1000)
    for name, previous in (("a", None), ("b", "a"), ("x", None)):
        store.put(name, previous, response(name, 300))
    store.conversation("b", 1000)
    store.put("c", "b", response("c", 300))
    assert store.get("x") is None and store.conversation("c", 1000) is not None


def test_a_response_larger_than_the_store_is_not_kept(tmp_path: Path) -> None:
    store = store_in(tmp_path, most_bytes=100)
    store.put("a", None, response("a"))
    assert not store.put("b", None, response("b", 101))
    assert store.get("a") is not None and store.get("b") is None
    assert not ResponseStore(":memory:", 0, AGE_S).put("a", None, response("a"))


def test_a_response_is_forgotten_so_long_after_its_last_use(tmp_path: Path) -> None:
    clock = Clock()
    store = store_in(tmp_path, clock=clock)
    store.put("a", None, response("a"))
    store.put("b", None, response("b"))
    clock.now += AGE_S / 2
    assert store.get("a")
    clock.now += AGE_S / 2 + 1
    assert store.get("b") is None and store.get("a")
    clock.now += AGE_S + 1
    assert store.get("a") is None


def test_another_process_finds_what_was_kept_and_counts_it(tmp_path: Path) -> None:
    first = store_in(tmp_path, most_bytes=1000)
    first.put("a", None, response("a", 600))
    second = store_in(tmp_path, most_bytes=1000)
    assert second.get("a") == response("a", 600)
    second.put("b", None, response("b", 600))
    assert first.get("a") is None
    first.close()


def test_the_file_is_its_owner_s_only(tmp_path: Path) -> None:
    store_in(tmp_path).put("a", None, response("a"))
    for path in tmp_path.iterdir():
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path


def test_what_is_no_store_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "s.sqlite").write_text("no database at all, but a text that is long enough to be seen as one")
    with pytest.raises(StartupError, match="--responses-store"):
        store_in(tmp_path)
    with pytest.raises(StartupError, match="--responses-store"):
        store_in(tmp_path / "missing")


def test_a_store_of_a_later_format_is_left_alone(tmp_path: Path) -> None:
    with sqlite3.connect(tmp_path / "s.sqlite") as database:
        database.execute("PRAGMA user_version = 2")
    with pytest.raises(StartupError, match="format"):
        store_in(tmp_path)


def test_a_store_that_fails_says_so(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    store.close()
    with pytest.raises(RequestError) as error:
        store.get("a")
    assert error.value.kind.status == 503


def test_links_that_lead_in_a_circle_have_an_end(tmp_path: Path) -> None:
    """Only somebody else can have written them: a response goes on from one that was there before."""
    store = store_in(tmp_path)
    for name, previous, size in (("a", "b", 10), ("b", "a", 10), ("self", "self", 0)):
        store.put(name, previous, response(name, size))
    for name in ("a", "self"):
        with pytest.raises(RequestError) as error:
            store.conversation(name, 1000)
        assert error.value.kind.status == 413
    assert store.get("a") == response("a"), "the store is free again"


def test_a_conversation_that_is_too_long_is_not_looked_for_to_its_beginning(tmp_path: Path) -> None:
    store = store_in(tmp_path)
    for name, previous in (("a", "gone"), ("b", "a"), ("c", "b")):
        store.put(name, previous, response(name, 600))
    with pytest.raises(RequestError, match="more than the limit of 1000 bytes"):
        store.conversation("c", 1000)
    assert store.conversation("a", 1000) is None


@asynchronous
async def test_who_waits_too_long_for_a_store_that_hangs_is_refused_and_other_threads_are_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(response_store, "MOST_WAITING_S", 0.0)
    store, disk = store_in(tmp_path), threading.Event()
    hanging = asyncio.create_task(store.run(disk.wait))
    waiting = [asyncio.create_task(store.run(store.get, "a")) for _ in range(100)]
    await asyncio.sleep(0)
    assert await asyncio.to_thread(len, "abc") == 3
    disk.set()
    results = await asyncio.gather(*waiting, return_exceptions=True)
    assert all(isinstance(error, RequestError) and error.kind is Kind.UNAVAILABLE for error in results)
    await asyncio.gather(hanging, return_exceptions=True)


def test_keeping_a_response_writes_bytes_in_proportion_to_its_size(tmp_path: Path) -> None:
    written = []
    for size in (1 << 20, 1 << 21, 1 << 22, 1 << 23):
        folder = tmp_path / str(size)
        folder.mkdir()
        store = store_in(folder, most_bytes=64 << 20)
        store.put("a", None, response("a", size))
        written.append((folder / "s.sqlite-wal").stat().st_size)
        store.close()
    assert all(large <= 2.1 * small for small, large in pairwise(written)), written
