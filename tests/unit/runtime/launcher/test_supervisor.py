"""The supervisor's decisions about its children. What it does with real processes is in tests/ring."""

import contextlib
import os
import signal
import subprocess
import sys
import time

import msgspec
import pytest

from quartet.runtime.launcher.child import Child, Service, binding_note, child_environment, usable_cores
from quartet.runtime.launcher.launch import SERVICES
from quartet.runtime.launcher.lull import Lull
from quartet.runtime.launcher.supervisor import (
    BUDGET_WINDOW_S,
    STANDBY_AGAIN_S,
    STANDBY_BYTES,
    ExitStatus,
    Signals,
    Supervisor,
)
from quartet.runtime.process import vitals
from quartet.runtime.process.memory import Memory
from quartet.runtime.process.progress import ProgressWord
from quartet.runtime.process.python_path import IMPORT_ROOT
from quartet.runtime.process.vitals import FROZEN_S, LOOK_EVERY_S
from quartet.runtime.service import Ready
from tests.configs import resolved

GATEWAY = Service("gateway", "g", listens=True)
SCHEDULER = Service("scheduler", "s", threads=0)


@pytest.fixture
def supervisor(tmp_path):
    return Supervisor([GATEWAY, SCHEDULER], resolved(), tmp_path, lifeline_fd=-1, listen_fd=9)


@pytest.fixture
def dead_child():
    """A child that ended with a status, after writing lines to its ready pipe."""
    children = []

    def make(service, code, *lines):
        read_fd, write_fd = os.pipe()
        for line in lines:
            os.write(write_fd, line)
        os.close(write_fd)
        process = subprocess.Popen([sys.executable, "-c", code])
        child = Child(service, process, os.pidfd_open(process.pid), read_fd, write_fd)
        process.wait()
        child.read_ready()
        children.append(child)
        return child

    yield make
    for child in children:
        with contextlib.suppress(OSError):  # the supervisor closes those that it replaces
            child.close()


def line(**fields):
    return msgspec.json.encode(Ready(role="scheduler", **fields)) + b"\n"


EXIT_0, EXIT_3 = "pass", "raise SystemExit(3)"
KILLED = "import os; os.kill(os.getpid(), 9)"


def test_a_death_after_ready_ends_the_server_as_died(supervisor, dead_child):
    supervisor.end_with(dead_child(SCHEDULER, EXIT_3, line()))
    assert supervisor.status == ExitStatus.DIED
    assert "the scheduler (pid" in supervisor.reason
    assert "ended with status 3" in supervisor.reason


def test_even_an_exit_with_status_zero_that_nobody_asked_for_is_a_death(supervisor, dead_child):
    supervisor.end_with(dead_child(SCHEDULER, EXIT_0, line()))
    assert supervisor.status == ExitStatus.DIED


def test_a_killed_child_is_described_by_its_signal(supervisor, dead_child):
    supervisor.end_with(dead_child(SCHEDULER, KILLED, line()))
    assert "was killed by SIGKILL (out of memory?)" in supervisor.reason


def test_a_gateway_that_ends_cleanly_after_draining_ends_the_server_cleanly(supervisor, dead_child):
    supervisor.draining_until = 1.0
    supervisor.end_with(dead_child(GATEWAY, EXIT_0, line()))
    assert (supervisor.status, supervisor.reason) == (ExitStatus.CLEAN, "")


def test_a_gateway_that_fails_while_draining_is_not_a_clean_end(supervisor, dead_child):
    supervisor.draining_until = 1.0
    supervisor.end_with(dead_child(GATEWAY, EXIT_3, line()))
    assert supervisor.status == ExitStatus.DIED


def up(supervisor, child):
    """The server serves, and then this child is found dead."""
    supervisor.was_ready = True
    supervisor.children[child.role] = child
    return child


def test_a_service_that_dies_is_started_again_as_the_next_epoch(supervisor, dead_child, tmp_path):
    (tmp_path / "scheduler.0").touch()
    supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    assert supervisor.status is None
    assert not supervisor.children and not supervisor.ready
    assert supervisor._due["scheduler"][1] == 1
    assert not (tmp_path / "scheduler.0").exists()


def test_the_budget_is_each_services_own_and_one_death_more_ends_the_server(supervisor, dead_child):
    for _ in range(supervisor.config.max_restarts):
        supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    supervisor.look_at_death(up(supervisor, dead_child(Service("tokenizer", "t"), KILLED, line())))
    assert supervisor.status is None
    supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    assert supervisor.status == ExitStatus.DIED


def test_old_deaths_are_forgiven(supervisor, dead_child, monkeypatch):
    for _ in range(supervisor.config.max_restarts):
        supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    later = time.monotonic() + BUDGET_WINDOW_S + 1
    monkeypatch.setattr(time, "monotonic", lambda: later)
    supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    assert supervisor.status is None


def test_repeated_deaths_wait_longer_and_longer(supervisor, dead_child, monkeypatch):
    monkeypatch.setattr(time, "monotonic", lambda: 100.0)
    delays = []
    for _ in range(supervisor.config.max_restarts):
        supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
        delays.append(supervisor._due["scheduler"][0] - 100.0)
    assert delays == sorted(delays) and delays[0] == 0.0 < delays[1] < delays[2]


def test_a_server_that_was_never_up_is_not_tried_again(supervisor, dead_child):
    supervisor.look_at_death(dead_child(SCHEDULER, EXIT_3))
    assert supervisor.status == ExitStatus.STARTUP


def test_what_keeps_a_service_from_starting_again_is_quoted(supervisor, dead_child):
    supervisor.config = resolved(max_restarts=0)
    supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, EXIT_3, line(error="the checkpoint is gone"))))
    assert supervisor.status == ExitStatus.DIED
    assert "the checkpoint is gone" in supervisor.reason


def test_a_startup_error_is_quoted_as_it_is(supervisor, dead_child):
    supervisor.end_with(dead_child(SCHEDULER, EXIT_3, line(error="no weights; use --load-format dummy")))
    assert (supervisor.status, supervisor.reason) == (ExitStatus.STARTUP, "no weights; use --load-format dummy")


def test_a_ready_line_may_come_in_pieces():
    read_fd, write_fd = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", "pass"])
    child = Child(SCHEDULER, process, os.pidfd_open(process.pid), read_fd, write_fd)
    whole = line()
    os.write(write_fd, whole[:5])
    child.read_ready()
    assert not child.ready
    os.write(write_fd, whole[5:])
    child.read_ready()
    assert child.ready
    process.wait()
    os.close(write_fd)
    child.close()


def test_each_service_sends_to_the_next_and_the_last_to_the_first(supervisor, tmp_path):
    gateway, scheduler = supervisor.boot(GATEWAY, 0, 5), supervisor.boot(SCHEDULER, 0, 6)
    assert (gateway.outbox, scheduler.outbox) == (f"ipc://{tmp_path}/scheduler", f"ipc://{tmp_path}/gateway")


def test_every_incarnation_binds_a_path_of_its_own(supervisor, tmp_path):
    assert supervisor.boot(SCHEDULER, 0, 5).inbox == f"ipc://{tmp_path}/scheduler.0"
    assert supervisor.boot(SCHEDULER, 3, 5).inbox == f"ipc://{tmp_path}/scheduler.3"


def test_only_the_service_that_listens_gets_the_http_socket(supervisor):
    assert supervisor.boot(GATEWAY, 0, 5).listen_fd == 9
    assert supervisor.boot(SCHEDULER, 0, 6).listen_fd == -1


def test_children_wait_passively_and_find_our_packages_first():
    environment = child_environment({"PYTHONPATH": "/mine", "NOTIFY_SOCKET": "/n", "HOME": "/h"}, GATEWAY)
    assert environment["OMP_WAIT_POLICY"] == "PASSIVE"
    assert environment["OMP_NUM_THREADS"] == "1"
    assert environment["PYTHONPATH"] == f"{IMPORT_ROOT}{os.pathsep}/mine"
    assert environment["HOME"] == "/h"
    assert "NOTIFY_SOCKET" not in environment


def test_what_the_operator_has_set_is_kept():
    service = Service("scheduler", "s", environment={"GLIBC_TUNABLES": "ours", "X": "1"})
    environment = child_environment({"OMP_NUM_THREADS": "5", "GLIBC_TUNABLES": "theirs"}, service)
    assert (environment["OMP_NUM_THREADS"], environment["GLIBC_TUNABLES"], environment["X"]) == ("5", "theirs", "1")


@pytest.mark.parametrize("name", ["OMP_PROC_BIND", "OMP_PLACES", "GOMP_CPU_AFFINITY"])
def test_openmp_binds_no_threads_and_who_wants_it_is_told(name):
    environment = {name: "0"}
    assert child_environment(environment, SCHEDULER)["OMP_PROC_BIND"] == "FALSE"
    assert binding_note(environment).startswith(f"{name} not used")


def test_who_binds_nothing_is_told_nothing():
    for environment in ({}, {"OMP_PROC_BIND": "false", "OMP_PLACES": "cores"}, {"OMP_PLACES": ""}):
        assert binding_note(environment) == ""


def test_the_scheduler_gets_a_thread_per_usable_core():
    assert child_environment({}, Service("scheduler", "", threads=0))["OMP_NUM_THREADS"] == str(usable_cores())


GROUPS = {  # where a control group's limit of CPU time is written
    2: ("0::/box", "30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw"),
    1: ("3:cpu,cpuacct:/box", "36 31 0:29 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu,cpuacct"),
}


@pytest.mark.parametrize(
    ("version", "files", "cores"),
    [
        (2, {"box/cpu.max": "max 100000"}, 4),
        (2, {"box/cpu.max": "200000 100000"}, 2),
        (2, {"box/cpu.max": "50000 100000"}, 1),
        (2, {"box/cpu.max": "max 100000", "cpu.max": "100000 100000"}, 1),
        (2, {}, 4),
        (1, {"box/cpu.cfs_quota_us": "-1", "box/cpu.cfs_period_us": "100000"}, 4),
        (1, {"box/cpu.cfs_quota_us": "150000", "box/cpu.cfs_period_us": "50000"}, 3),
    ],
)
def test_a_container_that_pays_for_fewer_cores_uses_fewer(tmp_path, monkeypatch, version, files, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})
    (tmp_path / "proc/self").mkdir(parents=True)
    for name, line in zip(("cgroup", "mountinfo"), GROUPS[version], strict=True):
        (tmp_path / "proc/self" / name).write_text(f"{line}\n")
    mount = tmp_path / ("sys/fs/cgroup" if version == 2 else "sys/fs/cgroup/cpu")
    (mount / "box").mkdir(parents=True)
    for name, text in files.items():
        (mount / name).write_text(f"{text}\n")
    assert usable_cores(tmp_path) == cores


@pytest.fixture
def served(supervisor):
    """Real processes that serve as far as the supervisor knows."""
    children, ends = [], []

    def make(service, code):
        word = ProgressWord(str(supervisor.run_dir), service.role)
        word.beat(busy=False)
        word.pulse()
        process = subprocess.Popen([sys.executable, "-c", code])
        read_fd, write_fd = os.pipe()
        child = Child(service, process, os.pidfd_open(process.pid), read_fd, write_fd, ready=True)
        supervisor.children[service.role] = child
        children.append(child)
        ends.append(write_fd)
        return child

    yield make
    for child, write_fd in zip(children, ends, strict=True):
        child.process.kill()
        child.process.wait()
        os.close(write_fd)
        child.close()


def look_for(supervisor, child, seconds, monkeypatch):
    """Look at a child for so long, on a clock of the test's; returns when it was found to hang."""
    begin = now = time.monotonic()
    monkeypatch.setattr(time, "monotonic", lambda: now)
    while not child.hung_at and now - begin < seconds:
        now += LOOK_EVERY_S
        supervisor.look_at_progress(child)
    monkeypatch.undo()
    return child.hung_at and child.hung_at - begin


@pytest.mark.parametrize("service", SERVICES)
@pytest.mark.parametrize("timeout_s", [3, 300])
def test_every_service_that_is_stopped_is_found_within_ten_seconds(supervisor, service, timeout_s, served, monkeypatch):
    supervisor.config = resolved(watchdog_timeout=timeout_s)
    child = served(service, "import time; time.sleep(600)")
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED)
    limit_s = min(timeout_s, FROZEN_S)
    assert limit_s < look_for(supervisor, child, 60, monkeypatch) <= limit_s + 3 * LOOK_EVERY_S
    assert vitals.read_vitals(child.process.pid).state is vitals.State.STOPPED  # SIGABRT waits for it; SIGKILL does not
    child.hung_at -= 60
    supervisor.look_at_progress(child)
    assert child.process.wait(60) == -signal.SIGKILL


def test_a_service_that_is_stopped_before_it_serves_again_is_found_too(supervisor, served, monkeypatch):
    child = served(SCHEDULER, "import time; time.sleep(600)")
    child.ready = False
    assert not look_for(supervisor, child, 60, monkeypatch), "a start may take its time"
    child.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, child.process.pid, os.WSTOPPED)
    assert FROZEN_S < look_for(supervisor, child, 60, monkeypatch) <= FROZEN_S + 3 * LOOK_EVERY_S
    child.hung_at -= 60
    supervisor.look_at_progress(child)
    assert child.process.wait(60) == -signal.SIGKILL


def test_a_process_that_was_stopped_while_it_stood_by_is_not_started(supervisor, served, monkeypatch):
    waiting, fresh = (served(SCHEDULER, "import time; time.sleep(600)") for _ in range(2))
    supervisor._standbys["scheduler"] = waiting
    monkeypatch.setattr("quartet.runtime.launcher.supervisor.start", lambda service, _: fresh)
    monkeypatch.setattr(Child, "give", lambda child, file, epoch: None)
    monkeypatch.setattr(waiting, "close", lambda: None)
    waiting.process.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, waiting.process.pid, os.WSTOPPED)
    assert supervisor.spawn(SCHEDULER, 1) is fresh
    assert waiting.process.returncode == -signal.SIGKILL and not supervisor._standbys


@pytest.mark.parametrize("service", SERVICES)
def test_no_service_that_computes_without_a_pulse_is_killed_before_the_time_out(
    supervisor, service, served, monkeypatch, tmp_path
):
    begun = tmp_path / "begun"
    child = served(service, f"open({str(begun)!r}, 'w').close(); sum(range(10**15))")  # in C, and holds the interpreter
    while not begun.exists() or vitals.read_vitals(child.process.pid).state is not vitals.State.RUNNABLE:
        time.sleep(0.01)
    limit_s = supervisor.config.watchdog_timeout
    assert limit_s < look_for(supervisor, child, 2 * limit_s, monkeypatch) <= limit_s + 3 * LOOK_EVERY_S
    assert child.process.wait(60) == -signal.SIGABRT


def test_a_service_that_cannot_be_started_again_for_want_of_resources_ends_the_server(
    supervisor, dead_child, monkeypatch
):
    def no_process(*_):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr("quartet.runtime.launcher.supervisor.start", no_process)
    supervisor.look_at_death(up(supervisor, dead_child(SCHEDULER, KILLED, line())))
    supervisor.spawn_due()
    assert supervisor.status == ExitStatus.DIED
    assert "the scheduler cannot be started again: [Errno 11]" in supervisor.reason


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({}, True), ({"disable_standby": True}, False), ({"low_memory": True}, False), ({"max_restarts": 0}, False)],
)
def test_a_process_stands_by_unless_the_settings_forbid_it(settings, wanted, tmp_path):
    service = Service("scheduler", "s", threads=0, standby=True)
    supervisor = Supervisor([GATEWAY, service], resolved(**settings), tmp_path, lifeline_fd=-1, listen_fd=9)
    assert supervisor._wants_standby(service) is wanted


def test_no_process_stands_by_where_memory_is_short(supervisor, monkeypatch, caplog):
    started = []
    monkeypatch.setattr(
        "quartet.runtime.launcher.supervisor.start", lambda service, _, standby: started.append((service.role, standby))
    )
    for left in (STANDBY_BYTES - 1, STANDBY_BYTES):
        monkeypatch.setattr(
            "quartet.runtime.launcher.supervisor.look", lambda left=left: Memory(left, 1 << 34, "a limit")
        )
        supervisor._standby_due["scheduler"] = 0.0
        supervisor._lulls["scheduler"] = Lull(latest=0.0)
        supervisor.spawn_due()
        assert started == ([] if left < STANDBY_BYTES else [("scheduler", True)])
    assert "No scheduler stands by: 512 MB may still be used by a limit." in caplog.text
    supervisor._standbys.clear()


def test_another_process_stands_by_for_one_that_died_while_it_waited(supervisor, dead_child, monkeypatch):
    supervisor._standbys["scheduler"] = dead_child(SCHEDULER, EXIT_3)
    now = time.monotonic()
    supervisor.look_at_standbys()
    assert not supervisor._standbys
    assert supervisor._standby_due["scheduler"] == pytest.approx(now + STANDBY_AGAIN_S, abs=1)
    started = []
    monkeypatch.setattr(
        "quartet.runtime.launcher.supervisor.start", lambda service, _, standby: started.append((service.role, standby))
    )
    monkeypatch.setattr("quartet.runtime.launcher.supervisor.look", lambda: Memory(STANDBY_BYTES, 1 << 34, "a limit"))
    monkeypatch.setattr("time.monotonic", lambda: now + 2 * STANDBY_AGAIN_S)
    supervisor.spawn_due()
    assert not started  # it has only begun to look whether the scheduler is busy
    monkeypatch.setattr("time.monotonic", lambda: now + 3 * STANDBY_AGAIN_S)
    supervisor.spawn_due()
    assert started == [("scheduler", True)]
    supervisor._standbys.clear()


@pytest.mark.parametrize("asked", [True, False])
def test_who_asks_for_the_end_once_more_does_not_cut_the_cleaning_up_short(asked):
    before = {number: signal.getsignal(number) for number in Signals.NUMBERS}
    try:
        with Signals() as signals:
            if asked:
                os.kill(os.getpid(), signal.SIGTERM)
            assert signals.count == asked
        after = {number: signal.getsignal(number) for number in Signals.NUMBERS}
        assert after == (dict.fromkeys(Signals.NUMBERS, signal.SIG_IGN) if asked else before)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
