"""Carries out deploy/Dockerfile in a clean Debian root: each COPY and RUN, then the entry point and the health check.

    python -m deploy.clean_root.image --root /tmp/image [--build-arg TORCH_INDEX=URL] [--bind PATH] [--env NAME=VALUE]

A Debian with Python 3.11 stands in for the image that FROM names, and a virtual environment for its Python. --bind and
--env are for machines whose package indexes need files or variables.
"""

import argparse
import json
import shlex
import shutil
import sys
import time
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath

from deploy.clean_root import dockerfile
from deploy.clean_root.root import PATH, Root, megabytes_in, until

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = ("ca-certificates", "python3", "python3-venv")
PYTHON = "/opt/python"
READY_S = 120
QUESTION = {"text": "What is the capital of France?", "sampling_params": {"temperature": 0}}


@dataclass
class Build:
    """A build as far as it has come."""

    root: Root
    arguments: dict[str, str]  # given by --build-arg
    environment: dict[str, str] = field(default_factory=dict)  # ENV: it stays
    variables: dict[str, str] = field(default_factory=dict)  # ARG: it ends with the build
    directory: str = "/"
    user: str = ""
    entry_point: list[str] = field(default_factory=list)
    health: str = ""

    def carry_out(self, step: dockerfile.Instruction) -> None:
        """One instruction. Raises CalledProcessError for a command that fails."""
        known = self.environment | self.variables
        match step.name:
            case "ARG":
                self.variables |= dockerfile.assignments(step.text, known) | {
                    name: value for name, value in self.arguments.items() if name == step.text.partition("=")[0]
                }
            case "ENV":
                self.environment |= dockerfile.assignments(step.text, known)
            case "WORKDIR":
                self.directory = step.text
                self.inside(step.text).mkdir(parents=True, exist_ok=True)
            case "COPY":
                self.copy(step.text.split())
            case "RUN":
                self.root.run(step.text, known, self.directory, self.user)
            case "USER":
                self.user = step.text
            case "HEALTHCHECK":
                self.health = dockerfile.health_command(step.text)
            case "ENTRYPOINT":
                self.entry_point = json.loads(step.text)

    def inside(self, path: str) -> Path:
        return self.root.directory / PurePosixPath(self.directory, path).as_posix().lstrip("/")

    def copy(self, words: Sequence[str]) -> None:
        """Files of the repository that .dockerignore lets through. Raises FileNotFoundError."""
        *sources, target = words
        patterns = dockerfile.patterns_of((REPOSITORY / ".dockerignore").read_text())
        for source in sources:
            found = [REPOSITORY / source, *(REPOSITORY / source).rglob("*")]
            seen = [each for each in found if dockerfile.is_visible(relative(each), patterns)]
            if not seen or not (REPOSITORY / source).exists():
                raise FileNotFoundError(f"COPY {source}: nothing that .dockerignore lets through")
            into = self.inside(target) / (source if target.endswith("/") else "")
            for each in seen:
                place(each, into / each.relative_to(REPOSITORY / source))


def relative(path: Path) -> PurePosixPath:
    return PurePosixPath(path.relative_to(REPOSITORY).as_posix())


def place(source: Path, target: Path) -> None:
    """Copy a file, or a link as a link; directories come with what is in them."""
    if source.is_dir() and not source.is_symlink():
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy2(source, target, follow_symlinks=False)


def prepared(root: Root) -> dict[str, str]:
    """Make the stand-in of the base image; returns the variables that it sets."""
    root.make(PACKAGES)
    root.run(f"test -e {PYTHON}/bin/python || python3 -m venv {PYTHON}")
    return {"PATH": f"{PYTHON}/bin:{PATH}"}


def serve(build: Build) -> None:
    """Start the container's process as its user, until the health check passes and an answer has come."""
    began = time.monotonic()
    line = shlex.join([*build.entry_point, "--port", "30000"])
    with build.root.running(line, build.environment, "/home/quartet", build.user) as process:
        until(build.root.command(build.health, build.environment, "/", build.user), READY_S, process)
        print(f"healthy after {time.monotonic() - began:.1f} s")
        request = urllib.request.Request("http://127.0.0.1:30000/generate", json.dumps(QUESTION).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            print(f"answer: {json.load(answer)['text']}")
    print("stopped with status 0")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.clean_root.image", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--root", type=Path, required=True, help="directory of the Debian root; made if it is not there"
    )
    parser.add_argument("--build-arg", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--bind", action="append", default=[], type=Path, metavar="PATH")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args(arguments)
    root = Root(given.root.resolve(), tuple(given.bind), pairs(given.env))
    build = Build(root, pairs(given.build_arg), prepared(root))
    before, began = megabytes_in(root.directory), time.monotonic()
    for step in dockerfile.parse((REPOSITORY / "deploy/Dockerfile").read_text()):
        print(f"{step.name} {step.text}", flush=True)
        build.carry_out(step)
    grown = megabytes_in(root.directory) - before
    print(f"built in {time.monotonic() - began:.0f} s; {grown:.0f} MB beyond Debian and Python")
    serve(build)
    return 0


def pairs(given: Sequence[str]) -> dict[str, str]:
    return {name: value for name, _, value in (each.partition("=") for each in given)}


if __name__ == "__main__":
    sys.exit(main())
