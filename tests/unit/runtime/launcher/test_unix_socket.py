"""The socket of --uds."""

import os
import socket

import pytest

from quartet.runtime.errors import StartupError
from quartet.runtime.launcher.unix_socket import listening


def test_the_socket_is_private_and_gone_at_the_end(tmp_path):
    path = tmp_path / "made" / "http.sock"
    with listening(str(path)):
        assert path.lstat().st_mode & 0o777 == 0o600
        assert path.parent.stat().st_mode & 0o777 == 0o700
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(str(path))
    assert not path.exists()


def test_the_socket_of_a_server_that_has_died_is_taken_over(tmp_path):
    path = tmp_path / "http.sock"
    with socket.socket(socket.AF_UNIX) as left_over:
        left_over.bind(str(path))
    with listening(str(path)), socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))


def test_a_socket_that_somebody_listens_on_is_refused_with_who(tmp_path):
    path = str(tmp_path / "http.sock")
    with listening(path):
        with pytest.raises(StartupError, match=rf"\(pid {os.getpid()}\) listens on --uds {path}"), listening(path):
            pass
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)  # it is untouched


def test_a_file_that_is_no_socket_is_left_alone(tmp_path):
    path = tmp_path / "precious"
    path.write_text("text")
    with pytest.raises(StartupError, match="is there and is no socket"), listening(str(path)):
        pass
    assert path.read_text() == "text"


def test_a_socket_that_another_server_has_put_there_is_not_removed(tmp_path):
    path = tmp_path / "http.sock"
    with listening(str(path)):
        path.unlink()
        with socket.socket(socket.AF_UNIX) as other:
            other.bind(str(path))
    assert path.exists()


@pytest.mark.parametrize("path", ["/proc/http.sock", "/" + "d" * 200, "/dev/null/http.sock"])
def test_a_path_that_cannot_be_is_one_line_that_names_the_flag(path):
    with pytest.raises(StartupError, match="--uds /") as refused, listening(path):
        pass
    assert "\n" not in str(refused.value)
