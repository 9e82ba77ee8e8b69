"""From nothing to the first answer in a clean Debian root: time, bytes, disk.

    python -m deploy.clean_root.first_answer --root DIR [--wheel FILE [--pip OPTIONS]] [--bind PATH] [--env NAME=VALUE]

Without --wheel: `git clone` of this repository, `make install`, `quartet serve`. With it: a virtual environment and
`pip install FILE`, with further options (an index of CPU builds, a version of torch). --bind and --env are for machines
whose package indexes need files or variables.
"""

import argparse
import json
import re
import subprocess
import sys
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from deploy.clean_root.image import QUESTION, REPOSITORY, pairs
from deploy.clean_root.root import RELEASE, Root, megabytes_in, until

PACKAGES = ("ca-certificates", "make", "gcc", "libc6-dev", "python3", "python3-venv")
HOME = "/root"
READY_S = 120
ASK = "python3 -c \"import urllib.request as r; r.urlopen('http://127.0.0.1:30000/readyz', timeout=4)\""
FETCHED = re.compile(
    r"^\s*Downloading (?P<name>\S+?)(?:\.metadata)? \((?P<size>[\d.]+) (?P<unit>[kMG]?)B\)", re.MULTILINE
)
FROM_DISK = re.compile(r"^\s*Processing (?P<path>/\S+\.whl)", re.MULTILINE)
UNITS = {"": 1e-6, "k": 1e-3, "M": 1.0, "G": 1e3}


def megabytes_fetched(printed: str) -> float:
    """What pip has fetched, by what it prints; wheels that lie on this machine count as if they came from a network."""
    sizes = {found["name"]: float(found["size"]) * UNITS[found["unit"]] for found in FETCHED.finditer(printed)}
    for found in FROM_DISK.finditer(printed):
        path = Path(found["path"])
        sizes.setdefault(path.name, path.stat().st_size / 1e6 if path.exists() else 0.0)
    return sum(sizes.values())


def first_answer(root: Root, line: str, directory: str) -> None:
    """Start the server, wait for it, ask it."""
    began = time.monotonic()
    with root.running(line, directory=directory) as process:
        until(root.command(ASK, {}, "/"), READY_S, process)
        ready = time.monotonic() - began
        request = urllib.request.Request("http://127.0.0.1:30000/generate", json.dumps(QUESTION).encode())
        with urllib.request.urlopen(request, timeout=60) as answer:
            text = json.load(answer)["text"]
        print(f"first answer after {time.monotonic() - began:.1f} s (ready after {ready:.1f} s): {text}")


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.clean_root.first_answer", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--root", type=Path, required=True, help="directory of the Debian root; made if it is not there"
    )
    parser.add_argument("--release", default=RELEASE, help="of Debian: bookworm has Python 3.11, trixie 3.13")
    parser.add_argument("--wheel", type=Path, help="install this file instead of a clone")
    parser.add_argument("--pip", default="", metavar="OPTIONS", help="further options of pip, for a wheel")
    parser.add_argument("--bind", action="append", default=[], type=Path, metavar="PATH")
    parser.add_argument("--env", action="append", default=[], metavar="NAME=VALUE")
    given = parser.parse_args(arguments)
    wheel = given.wheel.resolve() if given.wheel else None
    root = Root(given.root.resolve(), (*given.bind, *([wheel] if wheel else [])), pairs(given.env), given.release)
    began = time.monotonic()
    root.make(PACKAGES)
    print(f"Debian with {', '.join(PACKAGES)}: {time.monotonic() - began:.0f} s, {megabytes_in(root.directory):.0f} MB")
    before, began = megabytes_in(root.directory), time.monotonic()
    if wheel:
        pip = f"{HOME}/environment/bin/pip install {given.pip} {wheel}"
        printed = root.run(f"python3 -m venv {HOME}/environment && {pip}")
        directory, serve = HOME, f"{HOME}/environment/bin/quartet serve"
    else:
        clone = ["git", "clone", "-q", "--no-local", str(REPOSITORY), str(root.directory / HOME.strip("/") / "quartet")]
        subprocess.run(clone, check=True)
        print(f"cloned: {time.monotonic() - began:.1f} s, {megabytes_in(root.directory) - before:.0f} MB")
        directory, serve = f"{HOME}/quartet", ".venv/bin/quartet serve"
        printed = root.run("make install", directory=directory)
    grown = megabytes_in(root.directory) - before
    fetched = f"{megabytes_fetched(printed):.0f} MB fetched, {grown:.0f} MB on disk"
    print(f"installed after {time.monotonic() - began:.0f} s: {fetched}")
    first_answer(root, serve, directory)
    print(f"from nothing to the answer: {time.monotonic() - began:.0f} s; again:")
    first_answer(root, serve, directory)
    return 0


if __name__ == "__main__":
    sys.exit(main())
