"""The systemd unit under a real systemd: a clean Debian root is booted, and the service is killed and stopped.

    python -m deploy.clean_root.service --root DIR --wheel FILE [--pip OPTIONS] [--bind PATH] [--env NAME=VALUE]

Needs root, debootstrap and systemd-nspawn. The wheel is installed in /opt/quartet/.venv, as the unit wants it, and the
unit is enabled. Then systemd boots as process 1 of a container; it must say that the service is ready, start it again
after a SIGKILL of its main process, and see it end well when it is asked to stop.
"""

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path

from deploy.clean_root.image import QUESTION, REPOSITORY, pairs
from deploy.clean_root.root import Root

PACKAGES = ("ca-certificates", "gcc", "libc6-dev", "python3", "python3-venv", "systemd", "systemd-sysv", "dbus")
UNIT = "quartet.service"
NOT_NEEDED = ("systemd-resolved", "systemd-networkd", "console-getty")
PORT = 30777
START_S, STOP_S = 300, 60


def install(root: Root, wheel: Path, pip: str) -> None:
    """Make the root, with the package, the unit and its configuration in it."""
    root.make(PACKAGES)
    root.run(f"python3 -m venv /opt/quartet/.venv && /opt/quartet/.venv/bin/pip install -q {pip} {wheel}")
    shutil.copy(REPOSITORY / "deploy/systemd" / UNIT, root.directory / "etc/systemd/system")
    (root.directory / "etc/quartet.yaml").write_text(f"port: {PORT}\n")
    for action, units in (("enable", (UNIT,)), ("mask", NOT_NEEDED)):
        subprocess.run(["systemctl", f"--root={root.directory}", "-q", action, *units], check=True)


@contextlib.contextmanager
def booted(directory: Path) -> Iterator[int]:
    """Boot systemd in the root; the process that it is here."""
    boot = ["systemd-nspawn", "-q", "-D", str(directory), "--register=no", "--keep-unit", "--boot", "--console=pipe"]
    with subprocess.Popen([*boot, "--link-journal=no"], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL) as nspawn:
        try:
            children = Path(f"/proc/{nspawn.pid}/task/{nspawn.pid}/children")
            while not (found := children.read_text().split()):
                assert nspawn.poll() is None, f"systemd-nspawn ended with status {nspawn.returncode}"
                time.sleep(0.1)
            yield int(found[0])
        finally:
            nspawn.kill()


def systemctl(init: int, *arguments: str) -> str:
    """What systemctl prints inside; empty where it fails, as it does until systemd listens."""
    enter = ["nsenter", "--target", str(init), "--mount", "--pid", "--uts", "--ipc", "--cgroup", "--"]
    done = subprocess.run([*enter, "systemctl", *arguments], stdout=subprocess.PIPE, text=True, check=False)
    return done.stdout if not done.returncode else ""


def properties(init: int) -> dict[str, str]:
    """Some of the service's."""
    names = "ActiveState,Result,MainPID,NRestarts,User,ExecMainStatus"
    return dict(line.split("=", 1) for line in systemctl(init, "show", UNIT, "-p", names).splitlines())


def wait_for(init: int, state: str, restarts: int, timeout_s: float) -> dict[str, str]:
    """The service's properties once systemd says that it is in a state. Raises TimeoutError."""
    limit = time.monotonic() + timeout_s
    while True:
        found = properties(init)
        if found.get("ActiveState") == state and found.get("NRestarts") == str(restarts):
            return found
        if time.monotonic() > limit:
            raise TimeoutError(f"not {state} after {timeout_s:.0f} s: {found}")
        time.sleep(0.1)


def ask() -> str:
    """The answer to a question. Raises URLError."""
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}/generate", json.dumps(QUESTION).encode())
    with urllib.request.urlopen(request, timeout=60) as answer:
        return str(json.load(answer)["text"])


def drill(init: int) -> None:
    """Ready, killed, ready again, stopped; prints what systemd says. Raises AssertionError."""
    began = time.monotonic()
    found = wait_for(init, "active", 0, START_S)
    print(f"active after {time.monotonic() - began:.1f} s, as user {found['User']}; answer: {ask()}")
    began = time.monotonic()
    systemctl(init, "kill", "--kill-whom=main", "--signal=KILL", UNIT)
    again = wait_for(init, "active", 1, START_S)
    assert again["MainPID"] != found["MainPID"], again
    print(f"its main process killed, active again after {time.monotonic() - began:.1f} s; answer: {ask()}")
    began = time.monotonic()
    systemctl(init, "stop", UNIT)
    ended = wait_for(init, "inactive", 1, STOP_S)
    assert (ended["Result"], ended["ExecMainStatus"]) == ("success", "0"), ended
    print(f"stopped after {time.monotonic() - began:.1f} s: {ended['Result']}")
    with contextlib.suppress(urllib.error.URLError):
        raise AssertionError(f"it still answers: {ask()}")


def main(arguments: Sequence[str] | None = None) -> int:
    summary = (__doc__ or "").splitlines()[0]
    parser = argparse.ArgumentParser(prog="python -m deploy.clean_root.service", description=summary)
    parser.add_argument("--root", type=Path, required=True, help="directory of the Debian root; made if not there")
    parser.add_argument("--wheel", type=Path, required=True)
    parser.add_argument("--pip", default="", metavar="OPTIONS", help="further options of pip")
    parser.add_argument("--bind", action="append", default=[], type=Path, metavar="PATH")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args(arguments)
    wheel = given.wheel.resolve()
    root = Root(given.root.resolve(), (*given.bind, wheel), pairs(given.env))
    install(root, wheel, given.pip)
    with booted(root.directory) as init:
        drill(init)
    return 0


if __name__ == "__main__":
    sys.exit(main())
