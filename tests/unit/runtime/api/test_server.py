"""Servers started from Python: what they are told, what their failures say, and what importing this costs."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
from pathlib import Path

import psutil
import pytest

import quartet
from quartet.runtime.api import server as servers
from quartet.runtime.api.server import arguments, environment, launch, reason
from quartet.runtime.launcher import run_dir
from tests.structure import ROOT


@pytest.fixture
def stand_in(monkeypatch, tmp_path):
    """Servers are this program instead, which gets the flags of a server as its arguments."""

    def use(program: str) -> None:
        (tmp_path / "stand_in.py").write_text(program)
        real = subprocess.Popen
        monkeypatch.setattr(
            subprocess,
            "Popen",
            lambda command, **options: real([sys.executable, str(tmp_path / "stand_in.py"), *command[4:]], **options),
        )

    return use


SERVES = """
import signal, sys
path = next(word.partition("=")[2] for word in sys.argv if word.startswith("--ready-file="))
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
open(path, "w").write("http://127.0.0.1:41234\\n")
signal.pause()
"""
STUBBORN = SERVES.replace("lambda *_: sys.exit(0)", "signal.SIG_IGN")


def test_importing_quartet_imports_nothing_else():
    program = "import sys; before = set(sys.modules); import quartet; print(sorted(set(sys.modules) - before))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "['quartet']"


def test_launch_imports_neither_torch_nor_a_web_server():
    program = "import sys; from quartet import launch; print({'torch', 'starlette', 'zmq', 'numpy'} & set(sys.modules))"
    found = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    assert found.stdout.strip() == "set()"


def test_every_name_that_quartet_offers_can_be_imported():
    assert set(quartet.__all__) == set(quartet.PLACES) <= set(dir(quartet))
    assert all(getattr(quartet, name).__name__ == name for name in quartet.__all__)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = quartet.nothing


def test_flags_become_a_command_line():
    words = arguments("qwen", {"port": 0, "enable_metrics": False, "allowed_hosts": ["a", "b"]})
    assert words == ["--model-path=qwen", "--port=0", "--enable-metrics=false", "--allowed-hosts=a,b"]


def test_keys_are_not_on_the_command_line_but_in_the_environment():
    flags = {"api_key": ["one", "two"]}
    assert "one" not in " ".join(arguments("demo", flags))
    assert environment({}, flags)["QUARTET_API_KEY"] == "one,two"


def test_a_server_does_not_report_for_the_service_that_starts_it():
    assert "NOTIFY_SOCKET" not in environment({"NOTIFY_SOCKET": "/run/x"}, {})


@pytest.mark.parametrize(
    "last",
    ["quartet: no such model", json.dumps({"logger": "quartet", "level": "error", "message": "no such model"})],
)
def test_the_reason_of_a_failure_is_its_line_of_the_log(last):
    assert reason(f"[time] loading\n{last}\n") == "no such model"


def test_a_log_without_a_reason_gives_none():
    assert reason('[time] quartet: quoted\n{"message": "x"}\n{broken\n') == ""


def test_a_server_is_used_in_a_thread_without_signal_handlers(stand_in):
    stand_in(SERVES)
    before, found = signal.getsignal(signal.SIGTERM), []

    def use() -> None:
        with launch("demo") as server:
            found.extend([server.url, server.alive, server.log_path.exists()])
        found.extend([server.alive, server.log_path.exists()])

    thread = threading.Thread(target=use)
    thread.start()
    thread.join(120)
    assert found == ["http://127.0.0.1:41234", True, True, False, False]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_failure_is_one_exception_with_the_reason_and_leaves_the_log(stand_in, tmp_path):
    stand_in("import sys; print('quartet: unknown flag --prt; did you mean --port?'); sys.exit(2)")
    with pytest.raises(quartet.StartupError, match=r"^unknown flag --prt; did you mean --port\?$"):
        launch("demo", log_path=tmp_path / "log").wait_ready()
    assert (tmp_path / "log").exists()


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("max_totl_tokens", "; did you mean max_total_tokens?"),
        ("logpath", "; did you mean log_path?"),
        ("modl", "; did you mean model?"),
        ("qqqqq", "; flags are those of `quartet serve --help-all`"),
    ],
)
def test_a_keyword_that_is_no_flag_is_refused_with_the_nearest(stand_in, name, hint):
    stand_in("raise SystemExit('it was started')")
    with pytest.raises(TypeError) as refused:
        launch("demo", **{name: None})
    assert str(refused.value) == f"launch() got an unexpected keyword argument {name!r}{hint}"


def test_an_engine_hints_at_its_own_keywords_too():
    with pytest.raises(TypeError, match=r"^Engine\(\) got .* 'start_timeout'; did you mean start_timeout_s\?$"):
        quartet.Engine("demo", start_timeout=3)


@pytest.mark.parametrize("name", ["max_total_tokens", "model_path", "tp", "disable_radix", "grammar_backend"])
def test_flags_and_those_of_other_servers_are_keywords(name):
    servers.check_names("launch", [name], ())


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("lunch", "; did you mean launch?"),
        ("engine", "; did you mean Engine?"),
        ("LLM", "; did you mean Engine?"),
        ("ServerArgs", "; did you mean launch, whose keyword arguments are the server's flags?"),
        ("zzz", ""),
    ],
)
def test_a_name_that_quartet_lacks_is_told_with_the_nearest(name, hint):
    with pytest.raises(AttributeError) as missing:
        getattr(quartet, name)
    assert str(missing.value) == f"module 'quartet' has no attribute {name!r}{hint}"


def test_an_end_without_a_reason_says_the_status_and_keeps_the_log(stand_in):
    stand_in("raise SystemExit(7)")
    server = launch("demo")
    with pytest.raises(quartet.StartupError, match="ended with status 7") as failure, server:
        pass
    assert failure.value.__notes__ == [f"The server's log: {server.log_path}"]
    assert server.log_path.exists()
    shutil.rmtree(server.log_path.parent)


def test_wrong_flags_leave_no_files(stand_in):
    stand_in("raise SystemExit(2)")
    server = launch("demo")
    with pytest.raises(quartet.StartupError), server:
        pass
    assert not server.log_path.parent.exists()


def test_a_server_that_is_late_is_told_apart_from_one_that_failed(stand_in):
    stand_in("import signal; signal.pause()")
    server = launch("demo")
    with pytest.raises(quartet.StartupError, match=r"not ready within 0\.1 s"):
        server.wait_ready(0.1)
    assert server.alive
    assert server.stop(0.1) == -signal.SIGTERM


def test_the_address_is_not_guessed_before_it_is_known(stand_in):
    stand_in("import signal; signal.pause()")
    server = launch("demo")
    with pytest.raises(RuntimeError, match="wait_ready"):
        _ = server.url
    server.stop(0.1)


def test_a_server_that_does_not_stop_is_killed(stand_in, monkeypatch):
    stand_in(STUBBORN)
    monkeypatch.setattr(servers, "KILL_AFTER_S", 0.1)
    server = launch("demo").wait_ready()
    assert server.stop(0.1) == -signal.SIGKILL
    assert server.stop() == -signal.SIGKILL


TWICE = """
import sys, time
from quartet.runtime.launcher.supervisor import Signals
path = next(word.partition("=")[2] for word in sys.argv if word.startswith("--ready-file="))
with Signals() as signals:
    open(path, "w").write("http://127.0.0.1:41234\\n")
    while signals.count < 2:
        time.sleep(0.01)
sys.exit(143)
"""


def test_a_stop_without_patience_ends_a_server_that_waits_for_its_requests(stand_in):
    stand_in(TWICE)
    assert launch("demo").wait_ready().stop(0.0) == 143


def test_what_a_killed_program_leaves_is_removed_by_the_next_start(tmp_path):
    program = (
        "import time; from quartet.runtime.launcher.run_dir import *\n"
        f"print(locked(Path({str(tmp_path)!r}), SERVER_PREFIX)[0], flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        directory = Path(killed.stdout.readline().strip())
        with run_dir.private(tmp_path):
            assert directory.exists()
        killed.kill()
    with run_dir.private(tmp_path):
        assert not directory.exists()


def test_a_log_that_is_kept_is_removed_by_no_later_start(stand_in, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    stand_in("raise SystemExit(7)")
    server = launch("demo")
    with pytest.raises(quartet.StartupError), server:
        pass
    with run_dir.private(tmp_path):
        assert server.log_path.exists()


def test_a_server_that_nobody_refers_to_is_stopped(stand_in):
    stand_in(SERVES)
    server = launch("demo").wait_ready()
    process = psutil.Process(server.pid)
    del server
    assert process.wait(120) in (0, None)


def test_a_process_forked_from_ours_does_not_stop_our_server(tmp_path):
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as process:
        servers.abandon(process, tmp_path, -1, os.getpid() + 1)
        assert process.poll() is None
        assert tmp_path.exists()
        process.kill()


def test_a_process_that_was_forked_does_not_stop_the_server_of_its_parent(stand_in):
    stand_in(SERVES)
    with launch("demo") as server:
        server.wait_ready(120)
        child = os.fork()
        if child == 0:
            server.stop()
            os._exit(0)
        os.waitpid(child, 0)
        assert server.alive and server.log_path.exists()
