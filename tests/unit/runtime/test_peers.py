"""Commands of other servers."""

import shlex

import pytest

from quartet.runtime import cli
from quartet.runtime.peers import COMMANDS, instead


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["run", "qwen3"], "quartet chat qwen3"),
        (["run", "--verbose", "qwen3"], "quartet chat qwen3"),
        (["generate"], "quartet chat"),
        (["launch_server"], "quartet serve"),
        (["ls"], "quartet models"),
        (["rm", "o/n"], "quartet models rm o/n"),
        (["fly"], ""),
    ],
)
def test_a_command_of_others_becomes_ours(typed, meant):
    assert instead(typed[0], typed[1:]) == meant


def test_what_is_suggested_exists_and_ours_are_not_hidden():
    assert not COMMANDS.keys() & cli.COMMANDS.keys()
    for text in COMMANDS.values():
        word = shlex.split(text)[1]
        assert word in cli.COMMANDS or word in ("--help", "--version")


@pytest.mark.parametrize(
    ("typed", "said"),
    [
        (["run", "qwen3"], "quartet: unknown command run; here it is: quartet chat qwen3\n"),
        (["Qwen/Qwen3-0.6B"], "to serve that model: quartet serve Qwen/Qwen3-0.6B; to talk to it: quartet chat"),
        (["fly"], "the commands are serve, "),
    ],
)
def test_the_command_says_it_in_one_line(typed, said, capsys):
    assert cli.main(typed) == 2
    assert said in capsys.readouterr().err
