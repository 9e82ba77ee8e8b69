"""Standard streams that are closed, full or left, and what the system refuses."""

import os
import resource
import signal
import subprocess
import sys

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.process import streams
from tests.servers import ROOT


def command(*arguments, **options):
    """The `quartet` command in a process of its own."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "quartet.runtime.cli", *arguments], env=environment, timeout=60, check=False, **options
    )


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_numbers_of_closed_streams_are_taken_at_once_so_that_no_socket_gets_them(closed):
    code = (
        "import os, sys\nfrom quartet.runtime.process import streams\n"
        "streams.keep_standard()\nprint('x', file=sys.stdout); print('y', file=sys.stderr)\n"
        "streams.settle()\nsys.exit(int(any(fd < 3 for fd in os.pipe())) or 7)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        preexec_fn=lambda: [os.close(fd) for fd in closed],
        timeout=60,
        check=False,
    )
    assert ended.returncode == 7


@pytest.mark.parametrize("arguments", [["--help"], ["serve", "--help"], ["config", "show"], ["completion", "bash"]])
def test_a_reader_who_has_left_is_no_traceback_and_told_by_the_status(arguments):
    read_end, write_end = os.pipe()
    os.close(read_end)
    ended = command(*arguments, stdout=write_end, stderr=subprocess.PIPE)
    os.close(write_end)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, b"")


@pytest.mark.parametrize("arguments", [["serve", "--zzz"], ["serve", "--api-key", ""], ["config"], ["zzz"]])
def test_an_error_that_nobody_can_read_keeps_its_status(arguments):
    with open("/dev/full", "wb") as full:
        assert command(*arguments, stdout=full, stderr=full).returncode == 2
    assert command(*arguments, preexec_fn=lambda: (os.close(1), os.close(2))).returncode == 2


PRINTED = [["--help"], ["--version"], ["serve", "--help"], ["config", "show"], ["completion", "bash"], ["models"]]


@pytest.mark.parametrize("arguments", PRINTED)
def test_output_that_finds_no_room_is_one_line_and_a_status(arguments, tmp_path):
    with open("/dev/full", "wb") as full:
        ended = command(*arguments, stdout=full, stderr=subprocess.PIPE)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1), ended.stderr
    assert ended.stderr.startswith(b"quartet: the output could not be written: No space left on device")


def test_output_that_is_cut_by_a_limit_is_one_line_and_a_status(tmp_path):
    with open(tmp_path / "out", "wb") as out:
        limited = {"preexec_fn": lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))}
        ended = command("completion", "bash", stdout=out, stderr=subprocess.PIPE, **limited)
    assert (ended.returncode, ended.stderr.count(b"\n")) == (1, 1), ended.stderr
    assert b"could not be written: File too large; raise the limit of a file's size (ulimit -f)" in ended.stderr
    assert (tmp_path / "out").stat().st_size == 100


def test_few_open_files_are_refused_with_the_number_that_is_needed(monkeypatch):
    monkeypatch.setattr("resource.getrlimit", lambda _: (20, 20))
    with pytest.raises(StartupError, match="only 20 files may be open; raise the limit to at least 48"):
        streams.check_open_files()


@pytest.mark.parametrize("limit", [48, 1024, -1])
def test_enough_open_files_are_enough(monkeypatch, limit):
    monkeypatch.setattr("resource.getrlimit", lambda _: (limit, -1))
    streams.check_open_files()


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (OSError(24, "Too many open files"), "Too many open files; raise the limit of open files (ulimit -n)"),
        (PermissionError(13, "Permission denied", "/m/config.json"), "Permission denied: /m/config.json"),
        (MemoryError(), "there is not enough memory"),
        (OSError("strange"), "strange"),
    ],
)
def test_a_cause_is_one_line_with_a_remedy(error, said):
    assert streams.cause(error) == said
