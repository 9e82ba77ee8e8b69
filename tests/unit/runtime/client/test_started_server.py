"""The log of a server that a chat starts: which line is shown."""

from pathlib import Path

import pytest

from quartet.runtime.client.connection import ClientError
from quartet.runtime.client.started_server import flags_of, last_line, started
from quartet.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("written", "line"),
    [
        (b"", ""),
        (b"[2026-01-01 10:00:00] Load weight begin.\n", "Load weight begin."),
        (b"Fetching:  0%|  |\rFetching: 50%|##  |\r\n", "Fetching: 50%|##  |"),
        (b"quartet: no such model\n\n", "quartet: no such model"),
        (b"\xff half a character", "\ufffd half a character"),
    ],
)
def test_the_last_line_of_a_log_is_shown_without_its_time(written, line):
    assert last_line(written) == line


def test_flags_behind_two_dashes_are_read_as_on_a_command_line():
    words = ["--dtype", "float32", "--disable-radix-cache", "--chunked-prefill-size", "-1", "--context-length=99"]
    assert flags_of(words) == {
        "dtype": "float32",
        "disable_radix_cache": "true",
        "chunked_prefill_size": "-1",
        "context_length": "99",
    }
    with pytest.raises(UsageError, match="unexpected argument 'demo'"):
        flags_of(["demo"])


def test_a_start_that_fails_says_why_and_leaves_nothing_but_the_log_that_it_names(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with (
        pytest.raises(ClientError, match=r"did not start: .*/no/such/model.* \(its log: ") as failed,
        started("/no/such/model", [], None, lambda line: None),
    ):
        raise AssertionError
    log = Path(str(failed.value).rpartition("its log: ")[2].rstrip(")"))
    assert "/no/such/model does not exist" in log.read_text()
    assert list(tmp_path.iterdir()) == [log]
