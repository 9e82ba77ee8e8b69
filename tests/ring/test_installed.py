"""An installed Quartet, from a wheel: outside the repository, beside Hugging Face's `kernels`. The source archive makes
the same wheel, byte for byte.

The environment is fresh. What Quartet depends on is lent to it by this one, at the end of its path, which does
not make this one's own Quartet visible: links of an editable installation work in their own environment only.
"""

import contextlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tests.servers import READY, ROOT

pytestmark = pytest.mark.slow
START_S = 120
OTHERS = "kernels"  # a distribution with a module of that name, as one of our folders has
LOOK = """
import importlib.util, pathlib, quartet, quartet.kernels.ops
from kernels import get_kernel
print(pathlib.Path(quartet.__file__).parent, importlib.util.find_spec("runtime"))
"""


def run(*command: object, cwd: Path) -> str:
    """What a command prints. Fails with all of it when the command fails."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    ran = subprocess.run(
        list(map(str, command)), cwd=cwd, env=environment, capture_output=True, text=True, timeout=250, check=False
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout.strip()


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """A directory with the wheel and the source archive of this repository."""
    source, out = tmp_path_factory.mktemp("source") / "repository", tmp_path_factory.mktemp("dist")
    kept = shutil.ignore_patterns(".*", "build", "dist", "tests", "*.egg-info", "__pycache__")
    shutil.copytree(ROOT, source, symlinks=True, ignore=kept)
    for kind in ("sdist", "wheel"):
        build(kind, source, out)
    return out


def build(kind: str, source: Path, out: Path) -> None:
    run(sys.executable, "-c", f"from setuptools import build_meta as b; b.build_{kind}({str(out)!r})", cwd=source)


def content(wheel: Path) -> dict[str, bytes]:
    """The files of a wheel, but for the list of them, whose order may differ."""
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist() if not name.endswith("RECORD")}


@pytest.fixture(scope="module")
def environment(built, tmp_path_factory):
    """The directory of a virtual environment with Quartet and the other distribution."""
    [archive] = built.glob("*.whl")
    tmp_path = tmp_path_factory.mktemp("installed")
    directory = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", directory, cwd=tmp_path)
    python = directory / "bin/python"
    [packages] = directory.glob("lib/python*/site-packages")
    (packages / "lent.pth").write_text(f"{sysconfig.get_path('purelib')}\n")
    install = (sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-build-isolation")
    run(*install, OTHERS, archive, cwd=tmp_path)
    return directory


def test_the_source_archive_makes_the_same_wheel(built, tmp_path):
    [archive], [wheel] = built.glob("*.tar.gz"), built.glob("*.whl")
    shutil.unpack_archive(archive, tmp_path / "unpacked", filter="data")
    [source] = (tmp_path / "unpacked").iterdir()
    build("wheel", source, tmp_path)
    [again] = tmp_path.glob("*.whl")
    assert again.name == wheel.name
    assert content(again) == content(wheel)


def test_its_license_is_told_and_comes_along(environment, tmp_path):
    """By the metadata of the current standard (an expression and a file), which tools can read."""
    [told] = environment.glob("lib/python*/site-packages/quartet_serve-*.dist-info")
    assert re.search(r"^License-Expression: Apache-2\.0$", (told / "METADATA").read_text(), re.MULTILINE)
    assert (told / "licenses" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (told.parent / "quartet" / "py.typed").is_file()


def test_it_serves_beside_others_and_leaves_their_names_alone(environment, tmp_path):
    [packages] = environment.glob("lib/python*/site-packages")
    assert run(environment / "bin/python", "-c", LOOK, cwd=tmp_path) == f"{packages / 'quartet'} None"
    assert re.match(r"quartet \d", run(environment / "bin/quartet", "--version", cwd=tmp_path))
    with serving(environment / "bin/python", tmp_path) as url:
        body = {"text": "The capital of France is", "sampling_params": {"temperature": 0, "max_new_tokens": 4}}
        answer = requests.post(f"{url}/generate", json=body, timeout=60).json()
        assert answer["meta_info"]["completion_tokens"] == 4
        assert "Paris" in answer["text"]
        assert requests.get(f"{url}/docs", timeout=60).ok  # a data file


def test_taking_it_away_leaves_the_others(environment, tmp_path):
    """The last test here: the environment is without it from then on."""
    python = environment / "bin/python"
    run(sys.executable, "-m", "pip", "--python", python, "uninstall", "-q", "-y", "quartet-serve", cwd=tmp_path)
    [packages] = environment.glob("lib/python*/site-packages")
    assert not (packages / "quartet").exists() and not (environment / "bin/quartet").exists()
    run(python, "-c", "from kernels import get_kernel", cwd=tmp_path)


@contextlib.contextmanager
def serving(python: Path, directory: Path) -> Iterator[str]:
    """The address of a server that this Python started in a directory."""
    log = directory / "log"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    with log.open("w") as output:
        process = subprocess.Popen(
            [str(python), "-m", "quartet.launch_server", "--port", "0"],
            cwd=directory,
            env=environment | {"PYTHONUNBUFFERED": "1"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        until = time.monotonic() + START_S
        while READY not in log.read_text():
            assert process.poll() is None and time.monotonic() < until, log.read_text()
            time.sleep(0.1)
        found = re.search(r"is served at (http://\S+)\. Try:", log.read_text())
        assert found, log.read_text()
        yield found[1]
    finally:
        process.terminate()
        assert process.wait(120) == 0, log.read_text()
