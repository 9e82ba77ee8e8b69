"""Packages that a bare machine lacks, from wheels that were carried there."""

import importlib.util
import platform
import sys
import zipfile
from pathlib import Path

ENGINE = ("msgspec", "xxhash", "llguidance")  # what the worker and the planner import besides torch
SERVER = (*ENGINE, "zmq", "starlette", "uvicorn", "h11", "setproctitle", "re2", "yaml", "tokenizers", "jinja2")


def unpack(wheels: Path, directory: Path) -> list[str]:
    """Unpack the wheels that fit this interpreter into a directory to import from; returns their names."""
    tag = f"cp{sys.version_info.major}{sys.version_info.minor}"
    fitting = [wheel for wheel in sorted(wheels.glob("*.whl")) if fits(wheel.name, tag)]
    for wheel in fitting:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(directory)
    return [wheel.name for wheel in fitting]


def fits(name: str, tag: str) -> bool:
    python, abi, system = name.removesuffix(".whl").split("-")[-3:]
    any_python = python.startswith("py3") or "py3" in python.split(".")
    return (any_python or tag in python or abi == "abi3") and ("any" in system or platform.machine() in system)


def missing(names: tuple[str, ...]) -> list[str]:
    """Those of the modules that cannot be imported."""
    return [name for name in names if importlib.util.find_spec(name) is None]
