"""What the launcher does with its processes, seen from outside."""

import contextlib
import json
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time

import psutil
import pytest
import requests

from quartet.runtime.launcher.run_dir import sweep
from quartet.runtime.launcher.supervisor import ExitStatus, Signals
from tests.servers import READY, ROOT, STAND_INS, launched

HELPERS = {"quartet.scheduler_service.grammar.check", "quartet.tokenizer_service.renderer"}
ROLES = {"gateway", "tokenizer", "scheduler", "detokenizer"}
LEFT_OVER_S = 20.0  # how long anything may outlive the launcher, on a machine that is busy


def assert_gone(processes, run_base):
    """No process runs and no file is left in the run directory's parent, soon after the launcher's end."""
    deadline = time.monotonic() + LEFT_OVER_S
    assert all(ends_by(deadline, process.pid) for process in processes), [process.pid for process in processes]
    while list(run_base.iterdir()) and time.monotonic() < deadline:
        os.sched_yield()
    assert list(run_base.iterdir()) == []


def ends_by(deadline, pid):
    """Whether the process is dead (reaped or not) by then."""
    try:
        pidfd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([pidfd], [], [], max(0.0, deadline - time.monotonic()))[0])
    finally:
        os.close(pidfd)


def test_ps_shows_the_four_titles_and_the_launcher(launch_stand_ins):
    server = launch_stand_ins()
    assert server.children().keys() >= ROLES
    assert psutil.Process(server.process.pid).cmdline()[0] == "quartet::launcher"


def test_no_title_no_environment_and_no_log_line_shows_a_key(launch_stand_ins):
    server = launch_stand_ins("--api-key", "s3cr3t-user", environment={"QUARTET_ADMIN_API_KEY": "s3cr3t-admin"})
    launcher = psutil.Process(server.process.pid)
    children = launcher.children(recursive=True)
    assert len(children) >= len(ROLES)
    assert not [process for process in [launcher, *children] if "s3cr3t" in " ".join(process.cmdline())]
    assert not [process for process in children if "s3cr3t" in " ".join(process.environ().values())]
    assert "s3cr3t" not in server.log


def test_ready_is_said_once_with_a_line_to_try(launch_stand_ins):
    server = launch_stand_ins()
    assert server.log.count("The server is fired up and ready to roll!") == 1
    assert f"curl -s {server.url}/generate" in server.log
    with socket.create_connection(("127.0.0.1", server.port), timeout=120) as connection:
        assert connection.recv(100).startswith(b"HTTP/1.0 200 OK")


def test_sockets_live_in_a_directory_that_is_private(launch_stand_ins):
    server = launch_stand_ins()
    (run_dir,) = server.run_base.iterdir()
    assert run_dir.stat().st_mode & 0o777 == 0o700
    assert {f"{role}.0" for role in ROLES} <= {path.name for path in run_dir.iterdir()}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_everything_with_status_zero(launch_stand_ins, number):
    server = launch_stand_ins()
    processes = list(server.children().values())
    server.signal(number)
    assert server.wait(LEFT_OVER_S + 5) == ExitStatus.CLEAN
    assert_gone(processes, server.run_base)


def test_sigkill_of_the_launcher_leaves_nothing_behind(launch_stand_ins):
    server = launch_stand_ins()
    processes = list(server.children().values())
    server.signal(signal.SIGKILL)
    server.wait()
    assert_gone(processes, server.run_base)


def test_processes_that_services_have_work_done_in_die_with_them_and_with_the_launcher():
    with launched() as server:
        helpers = helpers_at_work(server, "[ab]")
        for role in ("scheduler", "tokenizer"):
            server.children()[role].kill()
        deadline = time.monotonic() + LEFT_OVER_S
        assert all(ends_by(deadline, process.pid) for process in helpers)
        for role in ("scheduler", "tokenizer"):
            server.wait_for(f"The {role} serves again")
        helpers = helpers_at_work(server, "[cd]")
        server.signal(signal.SIGKILL)
        deadline = time.monotonic() + LEFT_OVER_S
        assert all(ends_by(deadline, process.pid) for process in helpers)


def helpers_at_work(server, regex):
    """The processes that check grammars and render templates, after a request that needed them."""
    answer = {"text": "x", "sampling_params": {"regex": regex, "max_new_tokens": 2}}
    assert requests.post(f"{server.url}/generate", json=answer, timeout=60).status_code == 200
    descendants = psutil.Process(server.process.pid).children(recursive=True)
    helpers = [process for process in descendants if HELPERS & set(process.cmdline())]
    assert {word for process in helpers for word in process.cmdline()} >= HELPERS
    return helpers


def test_sigkill_of_the_launcher_while_services_load_leaves_nothing_behind(launch_stand_ins):
    server = launch_stand_ins(services={"scheduler": "tests.stand_ins.never_ready"}, ready=False)
    server.wait_for("loading for ever")
    processes = list(server.children().values())
    server.signal(signal.SIGKILL)
    server.wait()
    assert_gone(processes, server.run_base)


def test_sigkill_of_the_launcher_while_interpreters_start_leaves_nothing_behind(launch_stand_ins):
    server = launch_stand_ins(ready=False)
    while not list(server.run_base.glob("quartet-*/detokenizer.0.boot")) and server.process.poll() is None:
        os.sched_yield()
    processes = psutil.Process(server.process.pid).children()
    server.signal(signal.SIGKILL)
    server.wait()
    assert processes
    assert_gone(processes, server.run_base)


def test_sigterm_while_services_load_ends_at_once_with_status_zero(launch_stand_ins):
    server = launch_stand_ins(services={"scheduler": "tests.stand_ins.never_ready"}, ready=False)
    server.wait_for("loading for ever")
    processes = list(server.children().values())
    server.signal(signal.SIGTERM)
    assert server.wait() == ExitStatus.CLEAN
    assert_gone(processes, server.run_base)


@pytest.mark.parametrize("role", sorted(ROLES))
def test_without_restarts_a_death_ends_the_server_and_names_the_process_and_its_fate(launch_stand_ins, role):
    server = launch_stand_ins("--max-restarts", "0")
    children = server.children()
    children[role].kill()
    assert server.wait() == ExitStatus.DIED
    assert f"quartet: the {role} (pid {children[role].pid}) was killed by SIGKILL" in server.output()
    assert_gone(children.values(), server.run_base)


def test_a_process_that_died_is_started_again_and_only_that_one(launch_stand_ins):
    server = launch_stand_ins()
    for role in sorted(ROLES):
        before = server.children()
        before[role].kill()
        server.wait_for(f"The {role} serves again")
        after = server.children()
        assert {name for name in ROLES if after[name].pid != before[name].pid} == {role}
    server.signal()
    assert server.wait() == ExitStatus.CLEAN
    assert_gone(after.values(), server.run_base)


def test_a_process_that_dies_again_and_again_ends_the_server(launch_stand_ins):
    server = launch_stand_ins("--max-restarts", "1")
    for count in range(2):
        server.wait_for("serves again") if count else None
        server.children()["detokenizer"].kill()
    assert server.wait() == ExitStatus.DIED
    assert "quartet: the detokenizer (pid" in server.output()


@pytest.mark.parametrize(
    ("first", "second", "status"),
    [
        (signal.SIGTERM, signal.SIGTERM, ExitStatus.FORCED),
        (signal.SIGINT, signal.SIGINT, ExitStatus.INTERRUPTED),
        (signal.SIGINT, signal.SIGTERM, ExitStatus.FORCED),
    ],
)
def test_a_second_signal_cuts_the_draining_short_and_tells_its_name(launch_stand_ins, first, second, status):
    server = launch_stand_ins(services={"gateway": "tests.stand_ins.stubborn_gateway"})
    server.signal(first)
    server.wait_for("still at it")
    again_at = time.monotonic() + Signals.SAME_S  # sooner it would count as the same request
    while time.monotonic() < again_at:
        os.sched_yield()
    server.signal(second)
    assert server.wait() == status


def test_two_signals_at_once_are_one_request_to_stop(launch_stand_ins):
    server = launch_stand_ins()
    server.signal(signal.SIGTERM)
    server.signal(signal.SIGINT)
    assert server.wait() == ExitStatus.CLEAN


def test_a_service_that_cannot_start_is_quoted_in_one_line(launch_stand_ins):
    server = launch_stand_ins(services={"scheduler": "tests.stand_ins.refuses"}, ready=False)
    assert server.wait() == ExitStatus.STARTUP
    *started, refusal = server.output().splitlines()
    assert refusal == "quartet: no weights in this directory; pass another --model-path"
    assert all(" has started within " in line for line in started)


def test_a_crash_while_starting_names_the_service_under_its_traceback(launch_stand_ins):
    server = launch_stand_ins(services={"detokenizer": "tests.stand_ins.crashes"}, ready=False)
    assert server.wait() == ExitStatus.STARTUP
    assert "ZeroDivisionError: a bug of the stand-in" in server.output()
    assert "quartet: the detokenizer ended with status 1 while starting" in server.output()


def test_a_port_in_use_is_refused_in_one_line_before_anything_starts(launch_stand_ins):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        server = launch_stand_ins("--port", str(port), ready=False)
        assert server.wait() == ExitStatus.STARTUP
    said = server.output()
    assert said.startswith(f"quartet: cannot listen on 127.0.0.1:{port}: process {os.getpid()} (")
    assert said.endswith(f") has that port; stop it (kill {os.getpid()}) or choose another --port (0: any free one)\n")


@pytest.mark.parametrize(
    ("flags", "status", "line"),
    [
        (["--model-path", "/nowhere/model"], ExitStatus.STARTUP, "--model-path /nowhere/model does not exist"),
        (["--max-runing-requests", "4"], ExitStatus.USAGE, "did you mean --max-running-requests?"),
        (["--port", "http"], ExitStatus.USAGE, "--port takes integer, not 'http'"),
        (["--host", "192.0.2.1"], ExitStatus.STARTUP, "--host is no address of this machine"),
        (["--watchdog-timeout", "0.5"], ExitStatus.STARTUP, "use 0 (never) or at least 3"),
        (["--chunked-prefill-size", "0"], ExitStatus.STARTUP, "use -1 for whole prompts"),
    ],
)
def test_a_misconfiguration_is_one_line_with_the_remedy(launch_stand_ins, flags, status, line):
    server = launch_stand_ins(*flags, ready=False)
    assert server.wait() == status
    assert server.output().startswith("quartet: ")
    assert server.output().count("\n") == 1
    assert line in server.output()


def test_a_left_over_run_directory_is_swept_and_a_live_one_is_not(launch_stand_ins):
    first = launch_stand_ins()
    (live,) = first.run_base.iterdir()
    dead = first.run_base / "quartet-00dead00"
    dead.mkdir(mode=0o700)
    (dead / "lock").touch()
    (dead / "scheduler.0").touch()
    sweep(first.run_base)
    assert not dead.exists()
    assert live.exists()


def test_an_open_host_without_a_key_is_warned_about(launch_stand_ins):
    server = launch_stand_ins("--host", "0.0.0.0")
    assert server.log.count("no --api-key is set") == 1


# a server that a program has started


PROGRAM = """
import subprocess, sys, threading, time
starting = threading.Thread(target=subprocess.Popen, args=(sys.argv[1:],))
starting.start()
starting.join()  # the thread that has started the server ends; the program goes on
time.sleep(600)
"""
SHELL = ["sh", "-c", 'cd . && "$@"; exit $?', "sh"]


@pytest.fixture
def program(model, tmp_path):
    """Start a program that starts a server; returns the program, and the server's processes once it serves."""
    programs = []

    def start(*flags, through=()):
        run_base = tempfile.mkdtemp(prefix="q", dir="/tmp")
        roles = [f"{role}={module}" for role, module in STAND_INS.items()]
        serve = [sys.executable, "-m", "tests.launcher", *roles, "--", "--port", "0", "--model-path", model, *flags]
        ours = {"XDG_RUNTIME_DIR": run_base, "PYTHONUNBUFFERED": "1", "PYTHONPATH": str(ROOT)}
        process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, *through, *serve],
            cwd=ROOT,
            env=os.environ | ours,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        programs.append((process, run_base))
        lines = []
        for line in process.stdout:
            lines.append(line)
            if READY in line:
                break
        else:
            raise AssertionError("".join(lines))
        return process, psutil.Process(process.pid).children(recursive=True)

    yield start
    for process, run_base in programs:
        for child in [*psutil.Process(process.pid).children(recursive=True), process] if process.poll() is None else []:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        process.stdout.close()
        process.wait()
        shutil.rmtree(run_base, ignore_errors=True)


@pytest.mark.parametrize("through", [[], SHELL, ["sh", "-c", '"$@"; true', "sh", *SHELL]])
def test_with_its_parent_a_server_ends_however_that_ends(program, through):
    process, processes = program("--exit-with-parent", through=through)
    assert "quartet::launcher" in {p.cmdline()[0] for p in processes if p.is_running() and p.cmdline()}
    process.kill()
    process.wait()
    deadline = time.monotonic() + LEFT_OVER_S
    servers = [p for p in processes if p.pid != process.pid]
    assert all(ends_by(deadline, p.pid) for p in servers)


def test_the_end_of_the_thread_that_started_a_server_is_not_its_parents(program):
    _, processes = program("--exit-with-parent")
    time.sleep(1)
    assert all(p.is_running() for p in processes if p.name() != "sh")


def test_a_parent_that_has_ended_already_is_nobody_to_serve_for(launch_stand_ins):
    dead = subprocess.run([sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, check=True)
    server = launch_stand_ins("--exit-with-parent", dead.stdout.decode().strip(), ready=False)
    assert server.wait() == ExitStatus.STARTUP
    assert "is no ancestor of this one (any more), so there is nobody to serve for" in server.output()


def test_an_ancestor_may_be_named(launch_stand_ins):
    server = launch_stand_ins("--exit-with-parent", str(os.getpid()))
    server.signal()
    assert server.wait() == ExitStatus.CLEAN


@pytest.fixture
def slow_steps():
    """The environment of a fake scheduler that takes its time."""
    return {"QUARTET_FAKE_STEP_S": "0.02"}


def stream(server, max_new_tokens):
    """A streaming generation whose first chunk has arrived: the response and the rest of its events."""
    body = {"text": "Hello", "sampling_params": {"max_new_tokens": max_new_tokens, "ignore_eos": True}, "stream": True}
    response = requests.post(f"{server.url}/generate", json=body, stream=True, timeout=120)
    response.raise_for_status()
    events = (json.loads(line[6:]) for line in response.iter_lines() if line.startswith(b"data: {"))
    next(events)
    return events


def test_sigterm_lets_a_running_stream_finish(launch_fake, slow_steps):
    server = launch_fake(environment=slow_steps)
    events = stream(server, max_new_tokens=40)
    server.signal()
    *_, last = events
    assert last["meta_info"]["completion_tokens"] == 40
    assert last["meta_info"]["finish_reason"] == {"type": "length", "length": 40}
    assert server.wait() == ExitStatus.CLEAN


def test_a_stream_that_outlasts_the_drain_timeout_is_aborted_and_the_end_is_clean(launch_fake, slow_steps):
    server = launch_fake("--drain-timeout", "0.1", environment=slow_steps)
    events = stream(server, max_new_tokens=1900)
    server.signal()
    *_, last = events
    assert last["meta_info"]["finish_reason"]["type"] == "abort"
    assert server.wait() == ExitStatus.CLEAN


def test_without_restarts_a_scheduler_that_dies_under_a_stream_ends_the_stream_and_the_server(launch_fake, slow_steps):
    server = launch_fake("--max-restarts", "0", environment=slow_steps)
    events = stream(server, max_new_tokens=1900)
    server.children()["scheduler"].kill()
    with pytest.raises(requests.exceptions.ChunkedEncodingError):
        list(events)
    assert server.wait() == ExitStatus.DIED
    assert "quartet: the scheduler (pid" in server.output()
