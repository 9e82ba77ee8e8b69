"""The file of --ready-file."""

import os

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.launcher.ready_file import kept


def test_it_is_there_while_the_server_serves_and_one_left_over_is_not(tmp_path):
    path = tmp_path / "ready"
    path.write_text("http://old\n")
    with kept(str(path)) as file:
        assert not path.exists()
        file.write(["http://127.0.0.1:7", "unix:/s"])
        assert path.read_text() == "http://127.0.0.1:7\nunix:/s\n"
        assert list(tmp_path.iterdir()) == [path]
    assert not path.exists()


def test_without_the_flag_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with kept(None) as file:
        file.write(["http://127.0.0.1:7"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["missing/ready", "."])
def test_a_place_that_cannot_be_written_is_refused_at_the_start(tmp_path, name):
    with pytest.raises(StartupError, match=r"^cannot write --ready-file "), kept(str(tmp_path / name)):
        pass


def test_what_no_server_has_written_is_refused_and_left_alone(tmp_path):
    notes, pipe = tmp_path / "notes", tmp_path / "pipe"
    notes.write_text("to do\n")
    os.mkfifo(pipe)
    for path in (notes, pipe):
        with pytest.raises(StartupError, match="that no server has written"), kept(str(path)):
            pass
        assert path.exists()
    assert notes.read_text() == "to do\n"


def test_what_has_taken_its_place_meanwhile_is_left_alone(tmp_path):
    path = tmp_path / "ready"
    with kept(str(path)) as file:
        file.write(["http://127.0.0.1:7"])
        path.write_text("mine\n")
    assert path.read_text() == "mine\n"
