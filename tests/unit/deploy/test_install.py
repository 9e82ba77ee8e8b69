"""What `make` installs: which torch, from where, how much is said, and how it fails. pip is a stand-in."""

import http.server
import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from deploy import install

ROOT = Path(install.ROOT)
STAND_IN_PIP = """
import json, os, sys
with open(os.environ["PIP_ARGUMENTS"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
print("Downloading torch-9.whl (190 MB)")
sys.exit(int(os.environ.get("PIP_STATUS", "0")))
"""
LISTED = "GPU 0: NVIDIA H100 (UUID: GPU-1)"


def executable(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """A directory that is all of the path, for stand-ins of commands."""
    directory = tmp_path / "commands"
    directory.mkdir()
    monkeypatch.setenv("PATH", str(directory))
    return directory


def nvidia_smi(commands: Path, *lines: str, status: int = 0) -> None:
    printed = "\n".join(f"echo '{line}'" for line in lines)
    executable(commands / "nvidia-smi", f"#!/bin/sh\n{printed}\nexit {status}\n")


def planned(choice: str, index: str = "", refused: str = "", extras: tuple[str, ...] = ()) -> install.Plan:
    return install.plan(choice, extras, index, lambda address: refused)[0]


def test_without_a_gpu_torch_comes_from_the_index_of_cpu_builds(commands):
    chosen = planned("auto")
    assert (chosen.gpu, chosen.index) == (False, install.TORCH_CPU_INDEX)
    assert chosen.pip_arguments()[4:] == ["--extra-index-url", install.TORCH_CPU_INDEX, "-e", str(ROOT)]


def test_with_a_gpu_torch_comes_with_cuda_and_triton_beside_it(commands):
    nvidia_smi(commands, LISTED)
    chosen = planned("auto", extras=("test",))
    assert (chosen.gpu, chosen.index) == (True, None)
    assert chosen.pip_arguments()[-1] == f"{ROOT}[test,gpu]"


@pytest.mark.parametrize(("lines", "status"), [((), 0), (("Failed to initialize NVML",), 9), ((LISTED,), 9)])
def test_a_driver_that_lists_no_gpu_is_none(commands, lines, status):
    nvidia_smi(commands, *lines, status=status)
    assert not install.has_gpu()


def test_the_choice_of_whoever_installs_comes_before_what_the_machine_has(commands):
    assert planned("1").gpu
    nvidia_smi(commands, LISTED)
    assert not planned("0").gpu


def test_an_index_that_was_named_is_taken_whatever_the_device(commands):
    assert planned("1", index="https://mirror/cu128").index == "https://mirror/cu128"
    assert planned("0", index="https://mirror/cpu", refused="no").index == "https://mirror/cpu"


def test_an_index_that_cannot_be_reached_is_left_out_and_said(commands):
    chosen, warning = install.plan("0", (), "", lambda address: "Name or service not known")
    assert chosen.index is None
    assert "--extra-index-url" not in chosen.pip_arguments()
    assert "(Name or service not known)" in warning and "TORCH_INDEX=URL" in warning


def test_an_index_is_reached_or_the_reason_is_said(unused_port):
    server = http.server.HTTPServer(("127.0.0.1", 0), Index)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        address = f"http://127.0.0.1:{server.server_address[1]}"
        assert install.unreachable(f"{address}/whl/cpu/") == ""
        assert "404" in install.unreachable(f"{address}/whl") or "Not Found" in install.unreachable(f"{address}/whl")
        assert "refused" in install.unreachable(f"http://127.0.0.1:{unused_port}/whl")
        assert install.unreachable("no address") != ""
    finally:
        server.shutdown()
        server.server_close()


class Index(http.server.BaseHTTPRequestHandler):
    """A package index with torch in /whl/cpu."""

    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/whl/cpu/torch/" else 404)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def unused_port():
    with http.server.HTTPServer(("127.0.0.1", 0), Index) as server:
        return server.server_address[1]


def test_every_extra_has_a_size_that_is_said():
    assert install.Plan(False, ("test", "agents"), None, "").size.download > install.CPU.download
    assert planned("1").size == install.CUDA
    assert install.CPU.words == "about 250 MB to download, 1.1 GB on disk"


def test_too_little_room_is_said_before_anything_is_fetched(tmp_path):
    assert install.check_room(tmp_path, install.Size(0, 0)) == ""
    assert "are needed in" in install.check_room(tmp_path, install.Size(0, 10**12))


@pytest.mark.parametrize("system", ["Darwin", "Windows", ""])
def test_other_systems_are_refused_in_one_line_before_anything_is_fetched(monkeypatch, capsys, system):
    monkeypatch.setattr("platform.system", lambda: system)
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("something was started"))
    assert install.main([]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert "needs Linux" in line and "container" in line


def test_an_extra_that_is_none_is_refused(capsys):
    assert install.main(["--extras", "tset"]) == 1
    assert "--extras takes test, agents" in capsys.readouterr().err


@pytest.fixture
def checkout(tmp_path):
    """What `make` reads of the repository, and a Python whose environments have a stand-in for pip."""
    directory = tmp_path / "checkout"
    (directory / "deploy").mkdir(parents=True)
    for name in ("Makefile", "pyproject.toml", "constraints.txt", "deploy/install.py"):
        shutil.copy(ROOT / name, directory / name)
    (tmp_path / "pip.py").write_text(STAND_IN_PIP)
    makes_environment = (
        f'"{sys.executable}" -m venv --without-pip "$3" && cp "{tmp_path}/pip.py" "$3"/lib/python3.*/site-packages/'
    )
    executable(tmp_path / "python", f"#!/bin/sh\n{makes_environment}\n")
    return directory


def make(checkout: Path, *words: str, status: str = "0") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """What `make` printed, and the arguments of each call of pip."""
    arguments = checkout / "arguments"
    arguments.write_text("")
    settings = {"PIP_ARGUMENTS": str(arguments), "PIP_STATUS": status, "MAKEFLAGS": ""}
    ran = subprocess.run(
        ["make", *words, f"PYTHON={checkout.parent / 'python'}", "TORCH_INDEX=https://mirror/cpu"],
        cwd=checkout,
        env=os.environ | settings,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    return ran, [json.loads(line) for line in arguments.read_text().splitlines()]


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_make_install_says_how_much_shows_pip_and_ends_with_the_next_command(checkout):
    ran, [arguments] = make(checkout, "install", "GPU=0")
    assert ran.returncode == 0, ran.stderr
    where = ["--extra-index-url", "https://mirror/cpu"]
    assert arguments == [
        "install",
        "--no-compile",
        "-c",
        str(checkout / "constraints.txt"),
        *where,
        "-e",
        str(checkout),
    ]
    size, shown = ran.stdout.index("about 250 MB to download"), ran.stdout.index("Downloading torch-9.whl")
    assert size < shown < ran.stdout.index(".venv/bin/quartet serve")
    assert ". .venv/bin/activate" in ran.stdout
    assert make(checkout, "install", "GPU=0")[1] == []  # nothing has changed
    [again] = make(checkout, "install", "GPU=1")[1]
    assert again[-1] == f"{checkout}[gpu]"


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_install_that_fails_says_so_and_is_tried_again(checkout):
    ran, calls = make(checkout, "install", "GPU=0", status="3")
    assert ran.returncode != 0 and len(calls) == 1
    assert "pip could not install it (status 3)" in ran.stderr
    assert len(make(checkout, "install", "GPU=0")[1]) == 1


@pytest.mark.skipif(shutil.which("make") is None, reason="make is not installed")
def test_an_environment_that_cannot_be_made_leaves_nothing_behind(checkout):
    executable(checkout.parent / "python", '#!/bin/sh\nmkdir -p "$3/bin"; touch "$3/bin/python"; exit 1\n')
    ran, calls = make(checkout, "install")
    assert ran.returncode != 0 and calls == []
    assert "apt install python3-venv" in ran.stdout
    assert not (checkout / ".venv").exists()


def test_the_bytecode_of_what_a_server_imports_is_kept_and_no_more(tmp_path, monkeypatch):
    for package in ("quartet", "other"):
        (tmp_path / package).mkdir()
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "quartet" / "used.py").touch()
    monkeypatch.setattr(install, "IMPORTS", "quartet.used")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    install.compile_used()
    kept = {path.name.partition(".")[0] for path in tmp_path.rglob("*.pyc")}
    assert kept == {"__init__", "used"} and not (tmp_path / "other" / "__pycache__").exists()


def test_what_is_compiled_can_be_imported():
    assert all(importlib.util.find_spec(module) for module in install.IMPORTS.split(", "))
