"""Whose end is the launcher's."""

import os
import subprocess
import sys

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.launcher import parent
from quartet.runtime.launcher.parent import DIRECT, ancestors, name_of, parent_of, to_watch

NAMES = {10: "python", 20: "bash", 30: "sh", 40: "node", 1: "systemd"}


@pytest.fixture(autouse=True)
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parent, "name_of", NAMES.__getitem__)


@pytest.mark.parametrize(
    ("given", "chain", "watched"),
    [
        (DIRECT, [10, 40, 1], [10]),
        (DIRECT, [20, 30, 10, 40, 1], [20, 30, 10]),  # shells are seen through
        (DIRECT, [30, 1], [30]),
        (DIRECT, [1], []),  # everything ends with it
        (DIRECT, [], []),
        (40, [20, 10, 40, 1], [20, 10, 40]),
        (10, [10, 40, 1], [10]),
    ],
)
def test_the_parent_is_watched_through_shells_or_up_to_the_one_named(
    given: int, chain: list[int], watched: list[int]
) -> None:
    assert to_watch(given, chain) == watched


def test_who_is_no_ancestor_has_ended() -> None:
    with pytest.raises(StartupError, match="process 77 is no ancestor"):
        to_watch(77, [10, 1])


def test_the_chain_begins_with_the_parent() -> None:
    assert ancestors(os.getpid())[0] == os.getppid()
    assert parent_of(1 << 30) == 0


def test_names_with_brackets_and_spaces_are_read() -> None:
    code = "import setproctitle, sys; setproctitle.setthreadtitle('a) b (c'); print(flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", code]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdin is not None
        process.stdout.readline()
        assert parent_of(process.pid) == os.getpid()
        assert name_of(process.pid) == "a) b (c"
        process.stdin.close()
