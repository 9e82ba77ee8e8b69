"""The log of a server that a chat starts: which line is shown."""

import pytest

from quartet.runtime.client.connection import ClientError
from quartet.runtime.client.started_server import last_line, started


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


def test_a_start_that_fails_says_why_and_names_the_log():
    with (
        pytest.raises(ClientError, match=r"did not start: .*/no/such/model.* \(its log: ") as failed,
        started("/no/such/model", [], None, lambda line: None),
    ):
        raise AssertionError
    path = str(failed.value).rpartition("its log: ")[2].rstrip(")")
    with open(path) as log:
        assert "/no/such/model does not exist" in log.read()
