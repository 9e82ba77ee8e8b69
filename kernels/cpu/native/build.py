"""Compiles the C sources beside this file with the machine's compiler, once: the result is kept in the user's cache.

A compiled file holds the kernels for one instruction set, as each takes several seconds to compile. Its name follows
from that, the sources, the flags and the compiler. It comes to its place as a whole; several processes may put it there
at once, also those of several machines that share the cache. Where the cache cannot be written, or others can write to
it, the file is compiled for this process only, and the log says so.

A file that has lost some of its bytes (a machine that went down, a full disk) would end the process that loads it. So
its hash stands behind the library, where the loader does not look, and one that does not fit is compiled again.
"""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import secrets
import shutil
import stat
import subprocess
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

log = logging.getLogger(__name__)

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=gnu11", "-fPIC", "-pthread", "-fno-strict-aliasing")
COMPILERS = ("gcc", "cc")
TIMEOUT_S = 600  # for each source; it takes 15 s of one core, and a machine may have other work
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
# Instruction sets, ascending, and what the kernel calls the CPU's features that are new in each.
FEATURES = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_vnni": {"avx512_vnni"},
    "avx512_bf16": {"avx512_bf16"},
    "amx": {"amx_tile", "amx_bf16", "amx_int8", "avx512vbmi"},
}
CPU_INFO = Path("/proc/cpuinfo")
HASH_BYTES = 32  # behind the library
PART = ".part"  # ends the name of a file that is being copied to the cache
PARTS_AGE_S = 3600  # older ones are left from a process that ended meanwhile


class CannotBuild(Exception):
    """There is no library, for this reason."""


class CompilerRefused(CannotBuild):
    """The compiler ran and failed: it may not know an instruction set."""


def compiler() -> str | None:
    """The path of the machine's C compiler."""
    return next(filter(None, map(shutil.which, COMPILERS)), None)


def is_possible() -> bool:
    """Whether this kind of machine can have the library at all; looks at nothing that takes time."""
    return platform.system() == "Linux" and platform.machine() in ("x86_64", "AMD64") and compiler() is not None


def about_cpu(what: str) -> list[str] | None:
    """The words of the first line of that name in /proc/cpuinfo; None where there is none."""
    with contextlib.suppress(OSError):
        for line in CPU_INFO.read_text().splitlines():
            name, _, words = line.partition(":")
            if name.strip() == what:
                return words.split()
    return None


def may_have(instruction_set: str) -> bool:
    """Whether the CPU lists the features of an instruction set; yes where it lists nothing. The library itself looks
    again, and whether the system allows their use."""
    listed = about_cpu("flags")
    names = list(FEATURES)
    wanted = set().union(*(FEATURES[name] for name in names[: names.index(instruction_set) + 1]))
    return listed is None or wanted <= set(listed)


def multiplies_pairs_slowly() -> bool:
    """Whether VDPBF16PS takes the CPU longer than the same products in float32: on Intel's, about 1.6 times as long."""
    return about_cpu("vendor_id") == ["GenuineIntel"]


@contextlib.contextmanager
def built(instruction_set: str, afresh: bool = False) -> Iterator[Path]:
    """The compiled library, from the cache where it is there, or compiled `afresh`. Raises CannotBuild.

    A file that is in no cache is gone afterwards; who has loaded it keeps it.
    """
    found = compiler()
    if not is_possible() or found is None:
        raise CannotBuild("they need Linux on x86-64, and gcc")
    directory = cache_directory()
    path = None if directory is None else directory / f"kernels-{instruction_set}-{fingerprint(found)}.so"
    if path is not None and not afresh and is_whole(path):
        yield path
        return
    with tempfile.TemporaryDirectory(prefix="quartet-native-") as temporary:
        with one_at_a_time(directory):
            if path is not None and not afresh and is_whole(path):  # another process has compiled meanwhile
                made = path
            else:
                made = compiled(found, instruction_set, Path(temporary))
                if path is not None and is_kept(made, path, afresh):
                    made = path
        yield made


@contextlib.contextmanager
def one_at_a_time(directory: Path | None) -> Iterator[None]:
    """Wait for other processes that compile for this cache: the ranks of a server start together.

    Where the file system has no locks, each compiles for itself.
    """
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):
            if directory is not None:
                descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                stack.callback(os.close, descriptor)
                fcntl.flock(descriptor, fcntl.LOCK_EX)  # ends with the process
        yield


def fingerprint(found: str) -> str:
    """What the compiled file depends on, as 20 hexadecimal digits."""
    digest = hashlib.sha256()
    program = Path(found).resolve()
    about = program.stat()
    digest.update(repr((FLAGS, str(program), about.st_size, about.st_mtime_ns)).encode())
    for source in sorted(SOURCES.glob("*.[ch]")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()[:20]


def is_whole(path: Path) -> bool:
    """Whether a file is there and as it was compiled."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-HASH_BYTES]).digest() == content[-HASH_BYTES:]


def run(command: list[str]) -> None:
    """Run the compiler. Raises CalledProcessError, OSError and TimeoutExpired."""
    subprocess.run(command, check=True, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)


def cache_directory() -> Path | None:
    """The directory of compiled kernels, made if need be; None, and a log line, where others could put files there."""
    directory = None
    try:
        base = os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser()
        directory = Path(base) / "quartet" / "native"
        directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        about = directory.stat()
    except (OSError, RuntimeError) as error:  # the latter: there is no home
        reason = f"it cannot be made ({error})"
    else:
        if about.st_uid == os.getuid() and not about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
            return directory
        reason = f"others can write to it (owner {about.st_uid}, mode {stat.S_IMODE(about.st_mode):o})"
    log_not_kept(directory, reason)
    return None


def log_not_kept(directory: Path | None, reason: object) -> None:
    where = "~/.cache" if directory is None else directory
    log.warning("Compiled kernels cannot be kept in %s, so every start compiles them again: %s.", where, reason)


def is_kept(made: Path, path: Path, afresh: bool) -> bool:
    """Put a compiled file into the cache, as a whole; False, and a log line, where that cannot be done.

    One that another process has put there meanwhile stays unless `afresh`: on a network file system, processes of other
    machines that have it mapped would lose it.
    """
    part = path.with_suffix(f".{secrets.token_hex(8)}{PART}")  # process numbers are unique on one machine only
    try:
        remove_old_parts(path.parent)
        part.touch(mode=0o600, exist_ok=False)
        shutil.copyfile(made, part)
        if not afresh:
            with contextlib.suppress(OSError):  # there is one already, or this file system has no links
                os.link(part, path)
        if afresh or not is_whole(path):
            part.replace(path)
    except OSError as error:
        log_not_kept(path.parent, error)
        return False
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
    return True


def remove_old_parts(directory: Path) -> None:
    """Remove what processes left that ended while they copied."""
    for part in directory.glob(f"*{PART}"):
        with contextlib.suppress(FileNotFoundError):  # another process removes it as well
            if part.stat().st_mtime < time.time() - PARTS_AGE_S:
                part.unlink()


def sources_of(instruction_set: str) -> list[Path]:
    """What a library is compiled from; what takes longest, the kernels themselves, is first."""
    common = sorted(path for path in SOURCES.glob("*.c") if path.stem not in FEATURES)
    return [SOURCES / f"{instruction_set}.c", *common]


def compiled(found: str, instruction_set: str, directory: Path) -> Path:
    """A library in a directory that is empty; several sources are compiled at once.

    Raises CannotBuild with the compiler's first words.
    """
    sources, library = sources_of(instruction_set), directory / "kernels.so"
    objects = [f"{directory}/{source.stem}.o" for source in sources]
    commands = [[found, *FLAGS, "-c", str(s), "-o", o] for s, o in zip(sources, objects, strict=True)]
    try:
        with ThreadPoolExecutor(CORES) as pool:
            list(pool.map(run, commands))
        run([found, "-shared", "-pthread", "-o", str(library), *objects, "-lm"])
        digest = hashlib.sha256(library.read_bytes()).digest()
        with library.open("ab") as file:
            file.write(digest)
    except subprocess.CalledProcessError as error:
        raise CompilerRefused(f"{found} failed: {error.stderr.strip()[:500]}") from error
    except (OSError, subprocess.TimeoutExpired) as error:
        raise CannotBuild(f"{found} failed: {error}") from error
    return library
