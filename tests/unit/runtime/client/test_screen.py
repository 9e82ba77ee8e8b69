"""What is printed on a terminal, and into a pipe."""

import io

import pytest

from quartet.runtime.client.screen import DIM, NORMAL, Screen, harmless


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(screen: Screen) -> str:
    assert isinstance(screen.out, io.StringIO)
    return screen.out.getvalue()


def speak(screen: Screen) -> str:
    screen.thought("Hm")
    screen.thought(".")
    screen.answer("Yes")
    screen.answer("!")
    screen.end_answer("2 tokens")
    return shown(screen)


def test_thoughts_are_dim_and_apart_from_the_answer_on_a_terminal():
    screen = Screen(Terminal(), Terminal(), {})
    assert speak(screen) == f"{DIM}Hm.{NORMAL}\n\nYes!\n{DIM}2 tokens{NORMAL}\n\n"


def test_a_pipe_gets_the_answer_alone():
    assert speak(Screen(io.StringIO(), io.StringIO(), {})) == "Yes!\n"


@pytest.mark.parametrize("environment", [{"NO_COLOR": "1"}, {"TERM": "dumb"}])
def test_nobody_gets_colours_who_does_not_want_them(environment):
    assert "\x1b" not in speak(Screen(Terminal(), Terminal(), environment))


def test_a_thought_that_is_stopped_does_not_leave_the_terminal_dim():
    screen = Screen(Terminal(), Terminal(), {})
    screen.thought("Hm")
    screen.end_answer("stopped")
    assert shown(screen) == f"{DIM}Hm{NORMAL}\n{DIM}stopped{NORMAL}\n\n"


def test_a_models_text_cannot_steer_the_terminal():
    assert harmless("a\x1b]0;title\x07b\u202ec") == "a\\x1b]0;title\\x07b\\u202ec"
    assert harmless("line\n\ttab 👩\u200d💻 é\r\n") == "line\n\ttab 👩\u200d💻 é\n"


def test_a_status_is_written_over_and_taken_away_and_not_piped():
    screen = Screen(Terminal(), Terminal(), {})
    screen.status("loading 1")
    screen.status("loading 1")
    screen.remark("ready")
    assert screen.notes.getvalue() == f"\r\x1b[K{DIM}loading 1{NORMAL}\r\x1b[K{DIM}ready{NORMAL}\n"
    piped = Screen(io.StringIO(), io.StringIO(), {})
    piped.status("loading 1")
    assert piped.notes.getvalue() == ""
