"""The first page of a server's flags, and the page of all."""

import re

import pytest

from quartet.runtime import cli
from quartet.runtime.settings.flags import settings
from quartet.runtime.settings.help_page import FIRST_PAGE, MOST_FLAGS, page


def flags_of(text: str) -> list[str]:
    return re.findall(r"^  (--[\w-]+|-h)", text, re.MULTILINE)


def test_the_first_page_is_short_and_says_how_to_see_the_rest():
    text = page("serve", everything=False)
    assert len(flags_of(text)) <= MOST_FLAGS
    assert text.startswith("usage: quartet serve [MODEL] [flags]\n")
    assert text.endswith(f"{len(settings()) - len(FIRST_PAGE)} more flags, for special cases: quartet serve --help-all")


def test_it_names_only_flags_that_exist():
    assert settings().keys() >= FIRST_PAGE


def test_the_whole_page_has_every_flag():
    assert {setting.spelling for setting in settings().values()} <= set(flags_of(page("serve", everything=True)))


@pytest.mark.parametrize("words", [["--help-all"], ["--help", "all"], ["-h", "all"]])
def test_all_flags_are_shown_where_they_are_asked_for(words, capsys):
    assert cli.main(["serve", *words]) == 0
    assert capsys.readouterr().out == page("serve", everything=True) + "\n"


def test_the_help_of_all_commands_is_one_page(capsys):
    assert cli.main(["--help"]) == 0
    assert len(capsys.readouterr().out.splitlines()) <= 30
