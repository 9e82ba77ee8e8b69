"""Records outlast a process, and the first one of several processes is one for all."""

import errno
import os
from pathlib import Path

import msgspec
import pytest

from quartet.runtime import records


class Note(msgspec.Struct):
    text: str


def test_a_record_is_replaced_as_a_whole_and_there_is_none_at_first(tmp_path: Path) -> None:
    assert records.read_record(str(tmp_path), "note.json", Note) is None
    for text in ("long text", "x"):
        records.write(str(tmp_path), "note.json", Note(text))
        assert records.read_record(str(tmp_path), "note.json", Note) == Note(text)


def test_what_is_written_first_stays_and_nothing_else_is_left(tmp_path: Path) -> None:
    for text in ("first", "second"):
        records.write_first(str(tmp_path), "note.json", Note(text))
        assert records.read_record(str(tmp_path), "note.json", Note) == Note("first")
    assert [file.name for file in tmp_path.iterdir()] == ["note.json"]


def test_where_the_file_system_has_no_links_what_is_written_first_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_links(*_: object) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    monkeypatch.setattr(os, "link", no_links)
    test_what_is_written_first_stays_and_nothing_else_is_left(tmp_path)
