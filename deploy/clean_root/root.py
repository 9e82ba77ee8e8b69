"""A directory with a Debian of its own, and commands that run in it as they would on a fresh machine."""

import contextlib
import os
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

RELEASE = "bookworm"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
STOP_S = 60


@dataclass
class Root:
    """`binds`: paths of this machine that are seen in it, not to be written to; `environment`: of every command.

    `release`: of Debian; bookworm's Python is 3.11, trixie's 3.13.
    """

    directory: Path
    binds: tuple[Path, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    release: str = RELEASE

    def make(self, packages: Sequence[str]) -> None:
        """Fill the directory unless it is filled. Downloads Debian's packages."""
        if (self.directory / "etc/debian_version").exists():
            return
        wanted = f"--include={','.join(packages)}"
        subprocess.run(["debootstrap", "--variant=minbase", wanted, self.release, str(self.directory)], check=True)
        (self.directory / "etc/resolv.conf").write_bytes(Path("/etc/resolv.conf").read_bytes())

    def command(self, line: str, environment: Mapping[str, str], directory: str, user: str = "") -> list[str]:
        """How a shell's line runs here: with processes, mounts and variables of its own, and nothing else of ours."""
        mounts = ["mount -t proc proc proc", "mount --rbind /dev dev", "mount -t tmpfs tmpfs dev/shm"]
        for path in self.binds:
            inside = shlex.quote(str(path).lstrip("/"))
            make = f"mkdir -p {inside}" if path.is_dir() else f"mkdir -p $(dirname {inside}) && touch {inside}"
            mounts.append(f"{make} && mount --bind -o ro {shlex.quote(str(path))} {inside}")
        variables = {"PATH": PATH, "HOME": self.home(user)} | self.environment | dict(environment)
        words = [f"{name}={value}" for name, value in variables.items()]
        inside = f"cd {shlex.quote(directory)} && {line}"
        who = [f"--userspec={user}:{user}"] if user else []
        enter = shlex.join(["chroot", *who, ".", "/usr/bin/env", "-i", *words, "/bin/sh", "-c", inside])
        script = f"cd {shlex.quote(str(self.directory))} && {' && '.join(mounts)} && exec {enter}"
        return ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--propagation", "private", "sh", "-c", script]

    def home(self, user: str) -> str:
        """A user's home directory."""
        lines = (self.directory / "etc/passwd").read_text().splitlines()
        homes = {fields[0]: fields[5] for fields in (line.split(":") for line in lines)}
        return homes.get(user or "root", "/")

    def run(self, line: str, environment: Mapping[str, str] | None = None, directory: str = "/", user: str = "") -> str:
        """What a line prints, which is shown as well. Raises CalledProcessError."""
        command = self.command(line, environment or {}, directory, user)
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
            assert process.stdout is not None
            printed = []
            for each in process.stdout:
                print(f"    {each}", end="", flush=True)
                printed.append(each)
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, line)
        return "".join(printed)

    @contextlib.contextmanager
    def running(
        self, line: str, environment: Mapping[str, str] | None = None, directory: str = "/", user: str = ""
    ) -> Iterator["subprocess.Popen[bytes]"]:
        """A process that stays. It is process 1 of its own world, as in a container; at the end it is asked to stop."""
        command = self.command(f"exec {line}", environment or {}, directory, user)
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield process
            stop(process)
        finally:
            process.kill()
            process.wait()


def stop(process: "subprocess.Popen[bytes]") -> None:
    """SIGTERM to the process inside; raises AssertionError unless it ends well."""
    for child in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split():
        os.kill(int(child), signal.SIGTERM)
    status = process.wait(STOP_S)
    assert status == 0, f"it ended with status {status}"


def until(works: Sequence[str], timeout_s: float, process: "subprocess.Popen[bytes]") -> None:
    """Wait until a command succeeds. Raises TimeoutError, and AssertionError when the process has ended."""
    limit = time.monotonic() + timeout_s
    while subprocess.run(works, capture_output=True, check=False).returncode:
        assert process.poll() is None, f"it ended with status {process.returncode}"
        if time.monotonic() > limit:
            raise TimeoutError(f"not ready after {timeout_s:.0f} s")
        time.sleep(0.1)


def megabytes_in(directory: Path) -> float:
    """What a directory takes on its disk, without what is mounted in it."""
    done = subprocess.run(["du", "-sxk", str(directory)], stdout=subprocess.PIPE, text=True, check=False)
    return int(done.stdout.split()[0]) * 1024 / 1e6
