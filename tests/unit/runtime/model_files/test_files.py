"""Files of a model directory: only regular ones of a bearable size are read, and nothing is waited for."""

import contextlib
import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import files, model_info, tokenizer_files
from quartet.runtime.model_files.embedding import read_modules
from quartet.runtime.model_files.files import read_small, read_small_text
from quartet.runtime.shorten import short
from quartet.tokenizer_service.chat import load_template


def unix_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener, contextlib.chdir(path.parent):
        listener.bind(path.name)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


def dangling(path: Path) -> None:
    path.symlink_to(path.with_name("gone"))


STRANGE: list[Callable[[Path], None]] = [os.mkfifo, unix_socket, endless, dangling, Path.mkdir]


@pytest.mark.parametrize("make", STRANGE)
def test_what_is_no_regular_file_is_refused_by_name(make: Callable[[Path], None], tmp_path: Path) -> None:
    make(tmp_path / "strange.json")
    with pytest.raises(StartupError, match=r"cannot read .*strange\.json: "):
        read_small(tmp_path / "strange.json", 100)


@pytest.mark.parametrize("make", STRANGE)
@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"]
)
def test_a_model_directory_with_such_a_file_is_refused(make: Callable[[Path], None], name: str, tmp_path: Path) -> None:
    if name != "config.json":
        (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    make(tmp_path / name)
    with pytest.raises(StartupError, match=f"cannot read .*{name}"):
        model_info.load(ServerConfig(model_path=str(tmp_path)))


@pytest.mark.parametrize("make", STRANGE)
def test_so_are_tokenizers_templates_and_modules(make: Callable[[Path], None], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"vocab_size": 5}')
    config = ServerConfig(model_path=str(tmp_path))
    info = model_info.load(config)
    for name in ("tokenizer.json", "chat_template.jinja", "modules.json"):
        make(tmp_path / name)
    for read in (
        lambda: tokenizer_files.load(tmp_path),
        lambda: load_template(info, config),
        lambda: read_modules(tmp_path),
    ):
        with pytest.raises(StartupError, match="cannot read"):
            read()


def test_a_file_that_is_too_large_is_not_read_to_its_end(tmp_path: Path) -> None:
    with (tmp_path / "a.json").open("wb") as file:
        file.truncate(1 << 40)  # a hole
    with pytest.raises(StartupError, match="larger than 1000 bytes"):
        read_small(tmp_path / "a.json", 1000)


def test_a_text_that_is_no_utf_8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(StartupError, match="not valid UTF-8"):
        read_small_text(tmp_path / "a.jinja", 1000)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("model.norm.weight", "model.norm.weight"),
        ("ä日", "ä日"),
        ("a\nb\x1b[31m", "a\\nb\\x1b[31m"),
        ("x" * 121, "x" * 90 + "…" + "x" * 30 + " (121 characters)"),
        ("\ud800", "\\ud800"),
    ],
)
def test_names_in_messages_are_short_and_printable(text: str, shown: str) -> None:
    assert short(text) == shown


def test_a_name_of_many_megabytes_is_shown_in_a_line() -> None:
    assert len(short("\n" * (8 << 20))) < 300


def test_a_home_directory_that_does_not_exist_is_said():
    assert files.expanded("~/a") == Path.home() / "a"
    with pytest.raises(StartupError, match="~nobody-of-that-name/x: there is no home directory"):
        files.expanded("~nobody-of-that-name/x")
