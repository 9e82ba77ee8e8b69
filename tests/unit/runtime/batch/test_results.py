"""The file of results: what is done stays done, whenever the process was killed."""

import os

import msgspec
import pytest

from quartet.runtime.batch import lines
from quartet.runtime.batch.lines import BadLine, Entry, Failure, Request
from quartet.runtime.batch.results import Results
from quartet.runtime.errors import UsageError

A, B = Request(1, "a", "/x", b"{}"), Request(2, "b", "/x", b"{}")
WRONG = BadLine("a", Failure("duplicate_custom_id", "line 3: ...", 3))


def test_what_was_written_is_known_when_the_file_is_opened_again(tmp_path):
    results = Results(tmp_path / "out")
    results.add(lines.answered("a", 200, b"{}"))
    results.add(lines.failed("a", WRONG.failure))
    results.add(lines.answered("b", 400, b"{}"))
    results.close()
    again = Results(tmp_path / "out")
    assert (again.succeeded, again.failed) == (1, 2)
    assert again.has(A) and again.has(B) and again.has(WRONG)
    assert not again.has(BadLine(None, Failure("x", "", 4)))


def test_a_result_that_must_not_be_there_is_not_written(tmp_path):
    def reserve(size: int) -> None:
        told.append(size)
        if len(told) > 1:
            raise ValueError("no room")

    told: list[int] = []
    results = Results(tmp_path / "out", reserve)
    results.add(lines.answered("a", 200, b"{}"))
    with pytest.raises(ValueError, match="no room"):
        results.add(lines.answered("b", 200, b"{}"))
    assert told[0] == results.size == (tmp_path / "out").stat().st_size and not results.has(B)


def test_the_error_of_a_line_does_not_stand_for_the_request_of_that_name(tmp_path):
    results = Results(tmp_path / "out")
    results.add(lines.failed("a", WRONG.failure))
    assert not results.has(A)


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_line_that_was_cut_off_is_removed_and_not_counted(tmp_path, cut):
    results = Results(tmp_path / "out")
    results.add(lines.answered("a", 200, b"{}"))
    size = results.size
    results.add(lines.answered("b", 200, b"{}"))
    os.truncate(tmp_path / "out", results.size - cut)
    results.close()
    again = Results(tmp_path / "out")
    assert again.has(A) and not again.has(B)
    assert (tmp_path / "out").stat().st_size == again.size == size
    again.add(lines.answered("b", 200, b"{}"))
    entries = [msgspec.json.decode(text, type=Entry) for text in (tmp_path / "out").read_bytes().splitlines()]
    assert [entry.custom_id for entry in entries] == ["a", "b"]


def test_a_file_of_something_else_is_left_as_it_is(tmp_path):
    (tmp_path / "out").write_text("dear diary\n")
    with pytest.raises(UsageError, match="line 1, is no result of a batch"):
        Results(tmp_path / "out")
    assert (tmp_path / "out").read_text() == "dear diary\n"


def test_two_runs_cannot_write_to_one_file(tmp_path):
    results = Results(tmp_path / "out")
    with pytest.raises(UsageError, match="another process writes to"):
        Results(tmp_path / "out")
    results.close()
    Results(tmp_path / "out").close()


def test_a_full_disk_leaves_no_half_line(tmp_path, monkeypatch):
    results = Results(tmp_path / "out")
    write = os.write
    monkeypatch.setattr(os, "write", lambda file, text: write(file, text[:10]))
    with pytest.raises(OSError, match="No space left"):
        results.add(lines.answered("a", 200, b"{}"))
    assert (tmp_path / "out").read_bytes() == b""
    assert results.count == 0
