"""The file of --ready-file."""

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
