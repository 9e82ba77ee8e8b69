"""What the launcher says, and to whom, and the socket it takes first."""

import socket

import pytest

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.launcher import launch


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({}, "curl -s http://127.0.0.1:30000/generate -d"),
        ({"host": "0.0.0.0", "port": 1}, "curl -s http://127.0.0.1:1/generate"),
        ({"host": "::1"}, "curl -s http://[::1]:30000/generate"),
        ({"is_embedding": True}, "/encode -d"),
        ({}, "Or open http://127.0.0.1:30000/ in a browser."),
        ({"api_key": "secret"}, "-H 'Authorization: Bearer <your key>'"),
    ],
)
def test_the_line_to_try_fits_the_configuration(settings, words):
    said = launch.what_next(ServerConfig(**settings))
    assert words in said
    assert "secret" not in said


def test_port_zero_takes_a_free_port():
    with launch.listen("127.0.0.1", 0) as listener:
        assert listener.getsockname()[1] > 0


def test_a_taken_port_is_refused_with_the_remedy():
    with launch.listen("127.0.0.1", 0) as listener, pytest.raises(StartupError, match="choose another --port"):
        launch.listen("127.0.0.1", listener.getsockname()[1])


def test_a_name_that_does_not_resolve_is_refused_by_name():
    with pytest.raises(StartupError, match=r"--host no\.such\.host\.invalid"):
        launch.listen("no.such.host.invalid", 0)


def test_systemd_is_told_where_it_asks_to_be(monkeypatch, tmp_path):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        launch.notify(b"READY=1")
        assert manager.recv(100) == b"READY=1"


def test_nobody_is_told_where_nobody_asks(monkeypatch):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    launch.notify(b"READY=1")


def test_a_run_directory_too_deep_for_sockets_is_refused_with_the_remedy():
    with pytest.raises(StartupError, match="set a shorter XDG_RUNTIME_DIR"):
        launch.check_path_length("/" + "d" * 100, launch.SERVICES)


@pytest.mark.parametrize(
    ("refused", "said"),
    [
        (PermissionError(13, "Permission denied", "/m/config.json"), "Permission denied: /m/config.json"),
        (OSError(28, "No space left on device"), "No space left on device; free some space"),
        (MemoryError(), "there is not enough memory"),
    ],
)
def test_what_the_system_refuses_the_launcher_is_one_line_and_the_status_of_a_start(monkeypatch, capsys, refused, said):
    def run(*_):
        raise refused

    monkeypatch.setattr(launch, "run", run)
    monkeypatch.setattr(launch, "set_up_logging", lambda _: None)
    monkeypatch.setattr("setproctitle.setproctitle", lambda _: None)
    assert launch.serve([], ()) == launch.ExitStatus.STARTUP
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"quartet: the server cannot start: {said}")
