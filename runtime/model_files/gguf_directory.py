"""A GGUF file as a model directory: config.json, tokenizer.json and what else belongs there, and a link to the file.

The rest of the server reads model directories. A short-lived process makes this one, since a vocabulary takes a few
hundred megabytes while it is converted, and holds the file's header within limits of memory and time:

    python -m quartet.runtime.model_files.gguf_directory PARENT_PID FILE DIRECTORY [tokenizer]

Nothing comes from it when all went well, else one line that says what is wrong with the file.
"""

import hashlib
import json
import os
import re
import resource
import subprocess
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import gguf_config, gguf_tokenizer
from quartet.runtime.model_files.files import opened
from quartet.runtime.model_files.gguf import MAGIC, GgufError, Header, read_header
from quartet.runtime.process.guarded import limit
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.process.python_path import python_path
from quartet.runtime.shorten import short

SUFFIX = ".gguf"
TYPE = re.compile(r"(?<=[-_.])(?:I?Q[1-8]_\w+|BF16|F16|F32)$", re.IGNORECASE)  # at the end of a file's name
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")
MAX_SHARDS = 1 << 10
WITH_TOKENIZER = "tokenizer"
CPU_LIMIT_S, WALL_LIMIT_S = 120, 240
MEMORY_LIMIT_BYTES, OUTPUT_LIMIT_BYTES = 8 << 30, 512 << 20
TOO_MUCH = "{}: reading its header takes too much memory, time or disk space"


def is_gguf(file: Path) -> bool:
    """Whether a file says that it is one, by its name or its first bytes."""
    if file.suffix.lower() == SUFFIX:
        return True
    try:
        with opened(file) as descriptor:
            return os.pread(descriptor, len(MAGIC), 0) == MAGIC
    except OSError:
        return False


def holds_other_weights(directory: Path) -> bool:
    """Whether a directory has weights in a format that comes first."""
    return any(any(directory.glob(pattern)) for pattern in ("*.safetensors", "*.safetensors.index.json", "*.bin"))


def is_model(directory: Path) -> bool:
    """Whether a directory's model is a GGUF file, for want of weights in another format."""
    return not holds_other_weights(directory) and any(directory.glob(f"*{SUFFIX}"))


def models_in(directory: Path) -> list[Path]:
    """The GGUF files of a directory and of its folders: one for each model, none for image projectors."""
    there = sorted(directory.glob(f"*{SUFFIX}")) or sorted(directory.glob(f"*/*{SUFFIX}"))
    files = [file for file in there if not file.name.lower().startswith("mmproj")]
    return [file for file in files if (shard := SHARD.fullmatch(file.name)) is None or int(shard[2]) == 1]


def chosen(where: str, directory: Path, choice: str | None) -> Path:
    """The GGUF file of a directory, by its type where there are several. Raises GgufError."""
    found = models_in(directory)
    if choice is not None:
        found = of_type(choice, found)
    if len(found) == 1:
        return found[0]
    names = ", ".join(short(file.name) for file in (found or models_in(directory))[:8]) or "none at all"
    if choice is None:
        raise GgufError(f"{where} holds several GGUF files ({names}); name one of them, as in {where}:{example(found)}")
    raise GgufError(f"{where} holds {len(found)} GGUF files of the type {choice}; there are {names}")


def of_type(choice: str, files: Sequence[Path]) -> list[Path]:
    """The files whose names are, or end with, a type."""
    wanted = re.compile(rf"(?:.*[-_.])?{re.escape(choice.removesuffix(SUFFIX))}", re.IGNORECASE)
    return [file for file in files if wanted.fullmatch(whole_name(file))]


def example(files: Sequence[Path]) -> str:
    """What names one of several files: the first type that no other file has too, else the first file's name."""
    types = (found[0] for file in files if (found := TYPE.search(whole_name(file))))
    return next((kind for kind in types if len(of_type(kind, files)) == 1), whole_name(files[0]) if files else "NAME")


def whole_name(file: Path) -> str:
    """A file's name without suffix and number of its shard."""
    shard = SHARD.fullmatch(file.name)
    return shard[1] if shard else file.stem


def shards_of(file: Path) -> list[Path]:
    """All files of a model that was split, or the one file. Raises GgufError where one is missing."""
    match = SHARD.fullmatch(file.name)
    if match is None:
        return [file]
    name, _, count = match.groups()
    if int(count) > MAX_SHARDS:
        raise GgufError(f"{file} claims {count} shards; at most {MAX_SHARDS} are read")
    shards = [file.with_name(f"{name}-{number:05}-of-{count}{SUFFIX}") for number in range(1, int(count) + 1)]
    for shard in shards:
        if not shard.is_file():
            raise GgufError(f"{shard} is missing, which belongs to {file}")
    return shards


def described(file: Path, parent: Path, tokenizer: bool) -> Path:
    """A directory below `parent` that describes the model of a file, always the same for the same file.

    `tokenizer`: with the tokenizer's files. Raises StartupError that says what is wrong with the file.
    """
    file = file.absolute()  # links are not followed: the hub's cache names files by their hashes
    directory = parent / f"gguf-{hashlib.sha256(os.fsencode(file)).hexdigest()[:16]}"
    command = [sys.executable, "-P", "-m", "quartet.runtime.model_files.gguf_directory", str(os.getpid()), str(file)]
    try:
        done = subprocess.run(
            [*command, str(directory), *([WITH_TOKENIZER] if tokenizer else [])],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env=os.environ | {"PYTHONPATH": python_path(os.environ)},
            timeout=WALL_LIMIT_S,
            check=False,
        )
    except subprocess.TimeoutExpired as error:
        raise GgufError(TOO_MUCH.format(file)) from error
    if done.returncode:
        raise GgufError(done.stdout.decode(errors="replace").strip() or TOO_MUCH.format(file))
    return directory


def write(file: Path, directory: Path, tokenizer: bool) -> None:
    """Fill the directory. Raises StartupError and OSError."""
    shards = shards_of(file)
    first, *others = (read_header(shard, whole=tokenizer) for shard in shards)
    tensors = {name: tensor for each in (first, *others) for name, tensor in each.tensors.items()}
    header = Header(file, first.metadata, tensors)
    config = gguf_config.config_of(header)
    directory.mkdir(mode=0o700, exist_ok=True)
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", gguf_config.generation_config_of(config))
    if tokenizer:
        write_json(directory / "tokenizer.json", gguf_tokenizer.tokenizer_of(header))
        write_json(directory / "tokenizer_config.json", gguf_tokenizer.settings_of(header))
        for name, template in gguf_tokenizer.templates_of(header).items():
            (directory / name).parent.mkdir(exist_ok=True)
            replace(directory / name, template)
    link(shards, directory)


def link(shards: Iterable[Path], directory: Path) -> None:
    for shard in shards:
        name = shard.name if shard.suffix == SUFFIX else f"{shard.name}{SUFFIX}"
        if not (directory / name).is_symlink():
            (directory / name).symlink_to(shard)


def write_json(path: Path, value: Any) -> None:
    replace(path, json.dumps(value, ensure_ascii=False, allow_nan=False))


def replace(path: Path, text: str) -> None:
    """Write a file as a whole; others may be reading the one before."""
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    new.replace(path)


def main() -> None:
    """Describe the file that the command line names, within limits; a failure is one line on stdout and status 1."""
    arm_death_signal(int(sys.argv[1]))
    file, directory = Path(sys.argv[2]), Path(sys.argv[3])
    limit(resource.RLIMIT_AS, MEMORY_LIMIT_BYTES)
    limit(resource.RLIMIT_FSIZE, OUTPUT_LIMIT_BYTES)
    limit(resource.RLIMIT_CPU, CPU_LIMIT_S)
    limit(resource.RLIMIT_CORE, 0)
    try:
        write(file, directory, WITH_TOKENIZER in sys.argv[4:])
    except StartupError as error:
        fail(str(error))
    except OSError as error:
        fail(f"cannot describe {file} in {directory}: {error.strerror}")
    except MemoryError:
        fail(TOO_MUCH.format(file))
    except (ValueError, ArithmeticError, RecursionError) as error:  # of values that no range forbids
        fail(f"{file} is not a GGUF file that can be served: {error}")


def fail(reason: str) -> NoReturn:
    os.write(1, (reason.splitlines() or [""])[0].encode(errors="replace"))
    os._exit(1)


if __name__ == "__main__":
    main()
