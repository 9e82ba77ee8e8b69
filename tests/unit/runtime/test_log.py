"""Log lines that quote what strangers say."""

import io
import json
import logging
import sys
from datetime import datetime

import pytest

from quartet.runtime import log
from quartet.runtime.config import ServerConfig
from quartet.runtime.launcher import launch
from quartet.runtime.limits import MAX_LOG_CHARS
from tests.servers import ROOT

FORGED = "v1\n[2026-01-01 00:00:00] The server is fired up and ready to roll!"


def written(message, *arguments, level=logging.INFO, **options):
    """What a record looks like in the log."""
    stream = io.StringIO()
    handler = log.Handler(stream)
    handler.setFormatter(log.Formatter(log.FORMAT, log.DATE_FORMAT))
    logger = logging.Logger("strange")
    logger.addHandler(handler)
    logger.log(level, message, *arguments, **options)
    return stream.getvalue()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("a\r\nb", r"a\r\nb"),
        ("a\x1b[2Jb", r"a\x1b[2Jb"),
        ("a\x9b31mb", r"a\x9b31mb"),
        ("a\x00b", r"a\x00b"),
        ("a\x7fb\x08", r"a\x7fb\x08"),
        ("a\tb", r"a\tb"),
        ("a\x85b", r"a\x85b"),
        ("a\u2028b\u2029c", r"a\u2028b\u2029c"),
        ("a\u202eb\u2066c\u200fd", r"a\u202eb\u2066c\u200fd"),
        ("a\u200bb\ufeffc", r"a\u200bb\ufeffc"),
        ("a\ud800b", r"a\ud800b"),
        ("größe 你好 🙂 C:\\n", "größe 你好 🙂 C:\\n"),
    ],
)
def test_a_message_is_one_line_that_a_terminal_does_not_obey(text, shown):
    line = written("version %s", text)
    assert line.endswith(f"version {shown}\n")
    assert len(line.splitlines()) == 1


def test_a_forged_line_stays_inside_the_one_that_quotes_it():
    assert len(written("Weight version updated to %s", FORGED).splitlines()) == 1
    assert len(written(FORGED).splitlines()) == 1


def test_a_traceback_keeps_its_lines_but_none_reads_as_one_of_the_log():
    try:
        raise ValueError(FORGED + "\x1b[2J")
    except ValueError:
        lines = written("request %s failed", "r\n", exc_info=True).splitlines()
    assert lines[0].endswith(r"request r\n failed")
    assert lines[1] == "    Traceback (most recent call last):"
    assert all(line.startswith("    ") for line in lines[1:])
    assert "\x1b" not in "".join(lines)


def test_a_stack_is_indented_likewise():
    assert all(line.startswith("    ") for line in written("here", stack_info=True).splitlines()[1:])


def test_a_message_without_end_is_cut():
    line = written("%s", "x" * (MAX_LOG_CHARS + 7))
    assert line.endswith("x ... (7 more characters)\n")


def test_every_process_logs_in_this_form(monkeypatch):
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        log.set_up_logging(ServerConfig())
        logging.getLogger("uvicorn.error").warning("path %s", "/a\nb")
        logging.getLogger("http_gateway.access").info("path %s", "/a\nb")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    assert [line.partition("] ")[2] for line in stream.getvalue().splitlines()] == [r"path /a\nb"] * 2


class Unwritable(io.StringIO):
    """A file on a full disk."""

    def write(self, text):
        raise OSError(28, "No space left on device")


def test_a_line_that_cannot_be_written_ends_nothing(capsys):
    handler = log.Handler(Unwritable())
    logger = logging.Logger("full")
    logger.addHandler(handler)
    logger.error("lost")
    log.say("lost too", Unwritable())
    log.say("nobody there", None)
    assert "Traceback" not in capsys.readouterr().err


def test_what_the_launcher_says_is_not_forged_either(capsys):
    assert launch.fail(launch.ExitStatus.STARTUP, FORGED) == launch.ExitStatus.STARTUP
    assert len(capsys.readouterr().err.splitlines()) == 1
    said = launch.what_next(ServerConfig(served_model_name=FORGED))
    assert len(said.splitlines()) == len(launch.what_next(ServerConfig()).splitlines())


def test_nothing_prints_around_the_log():
    """What a service prints by itself would not be made harmless."""
    sources = [path for name in SERVICES for path in (ROOT / name).rglob("*.py")]
    assert {str(path.relative_to(ROOT)) for path in sources if "print(" in path.read_text()} == PRINTING


SERVICES = ("http_gateway", "tokenizer_service", "scheduler_service", "detokenizer_service")
PRINTING = {"scheduler_service/weights/manifest.py"}  # a tool


def as_json(message, *arguments, level=logging.INFO, **options):
    """What a record looks like in a log of JSON: the line, and what it says."""
    stream = io.StringIO()
    handler = log.Handler(stream)
    handler.setFormatter(log.JsonFormatter("gateway"))
    logger = logging.Logger("strange")
    logger.addHandler(handler)
    logger.log(level, message, *arguments, **options)
    [line] = stream.getvalue().splitlines()
    return line, json.loads(line)


@pytest.mark.parametrize(
    "text", ["a\nb", "a\x1b[2J\x7f\x9b", "a\u2028b\u202e", "\ud800", FORGED, '"quoted"', "größe 你好"]
)
def test_json_is_one_line_of_ascii_that_says_the_message_as_it_is(text):
    line, said = as_json("version %s", text)
    assert said["message"] == f"version {text}"
    assert line.isascii() and line.isprintable()


def test_json_names_level_process_and_fields_and_keeps_a_traceback():
    try:
        raise ValueError("broken")
    except ValueError:
        _, said = as_json("INFO:     %s", "x", exc_info=True, extra={"fields": {"status": 200}})
    assert (said["level"], said["role"], said["message"], said["status"]) == ("info", "gateway", "x", 200)
    assert datetime.fromisoformat(said["time"]).tzinfo is not None
    assert said["exception"].endswith("ValueError: broken")
    _, cut = as_json("%s", "x" * (MAX_LOG_CHARS + 7))
    assert (len(cut["message"]), cut["cut_chars"]) == (MAX_LOG_CHARS, 7)
