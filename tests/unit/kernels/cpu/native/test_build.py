"""Compiling the CPU kernels: once for all processes, and never from a place that others can write to."""

import ctypes
import errno
import os
import shutil
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from quartet.kernels.cpu.native import build, library

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Where the cache is to be made. What is compiled is small."""
    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "one.c").write_text("int quartet_one = 1;\n")
    (sources / "avx2.c").write_text("int quartet_kernels = 2;\n")
    (sources / "amx.c").write_text("int quartet_kernels = 4;\n")
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quartet" / "native"


def test_a_second_start_finds_what_the_first_has_compiled(cache, monkeypatch):
    with build.built("avx2") as path:
        assert path.parent == cache
        loaded = ctypes.CDLL(str(path))
        assert [ctypes.c_int.in_dll(loaded, name).value for name in ("quartet_one", "quartet_kernels")] == [1, 2]
    monkeypatch.setattr(build, "compiled", lambda *_: pytest.fail("compiled again"))
    with build.built("avx2") as again:
        assert again == path
    assert list(cache.iterdir()) == [path], "parts are left"


def test_each_instruction_set_has_a_file_without_the_others(cache):
    for name, value in {"avx2": 2, "amx": 4}.items():
        with build.built(name) as path:
            assert ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "quartet_kernels").value == value
    assert len(list(cache.iterdir())) == 2


FLAGS = (
    "fpu fma f16c avx2 avx512f avx512bw avx512vl avx512dq avx512_bf16 avx512_vnni avx512vbmi amx_tile amx_bf16 amx_int8"
)


@pytest.mark.parametrize(
    ("flags", "found"),
    [
        (FLAGS, ["avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx"]),
        (FLAGS.replace("amx_bf16", ""), ["avx2", "avx512", "avx512_vnni", "avx512_bf16"]),
        (FLAGS.replace("avx512vbmi", ""), ["avx2", "avx512", "avx512_vnni", "avx512_bf16"]),
        (FLAGS.replace("avx512_bf16", ""), ["avx2", "avx512", "avx512_vnni"]),
        (FLAGS.replace("avx512_vnni", ""), ["avx2", "avx512"]),
        (FLAGS.replace("avx512dq", ""), ["avx2"]),
        ("fpu avx2 fma", []),
    ],
)
def test_only_instruction_sets_that_the_cpu_lists_are_compiled(flags, found, tmp_path, monkeypatch):
    listing = tmp_path / "cpuinfo"
    listing.write_text(f"processor\t: 0\nflags\t\t: {flags}\nbugs\t\t: spectre_v1\n")
    monkeypatch.setattr(build, "CPU_INFO", listing)
    assert [name for name in build.FEATURES if build.may_have(name)] == found


@pytest.mark.parametrize(
    ("vendor", "flags", "limit", "found"),
    [
        ("GenuineIntel", FLAGS.replace("amx_bf16", ""), "", ["avx512_vnni", "avx512", "avx2"]),
        ("GenuineIntel", FLAGS, "", ["amx", "avx512_vnni", "avx512", "avx2"]),
        ("GenuineIntel", FLAGS, "avx512_bf16", ["avx512_bf16", "avx512_vnni", "avx512", "avx2"]),
        ("AuthenticAMD", FLAGS.replace("amx_bf16", ""), "", ["avx512_bf16", "avx512_vnni", "avx512", "avx2"]),
    ],
)
def test_intel_multiplies_in_float32_where_it_has_no_tiles(vendor, flags, limit, found, tmp_path, monkeypatch):
    listing = tmp_path / "cpuinfo"
    listing.write_text(f"processor\t: 0\nvendor_id\t: {vendor}\nflags\t\t: {flags}\n")
    monkeypatch.setattr(build, "CPU_INFO", listing)
    monkeypatch.setenv("QUARTET_CPU_ISA", limit)
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    assert library.candidates() == found


def test_where_the_cpu_lists_nothing_all_are_tried(tmp_path, monkeypatch):
    monkeypatch.setattr(build, "CPU_INFO", tmp_path / "missing")
    assert all(map(build.may_have, build.FEATURES))


def test_processes_that_compile_at_once_all_get_a_whole_file(cache):
    code = f"""
import ctypes, pathlib
from quartet.kernels.cpu.native import build, library
build.SOURCES = pathlib.Path({str(build.SOURCES)!r})
with build.built("avx2") as path:
    assert ctypes.CDLL(str(path)).quartet_one
"""
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(subprocess.run, [sys.executable, "-c", code], check=False) for _ in range(3)]
    assert [run.result().returncode for run in runs] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_of_processes_that_start_at_once_one_compiles(cache, tmp_path):
    compiler = tmp_path / "bin" / "gcc"
    compiler.parent.mkdir()
    compiler.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/calls\nexec {shutil.which("gcc")} "$@"\n')
    compiler.chmod(0o755)
    source = (
        "from pathlib import Path\nfrom quartet.kernels.cpu.native import build\n"
        f"build.SOURCES = Path({str(build.SOURCES)!r})\nwith build.built('avx2') as path: print(path)"
    )
    environment = {**os.environ, "PATH": f"{compiler.parent}:{os.environ['PATH']}"}
    starts = [
        subprocess.Popen([sys.executable, "-c", source], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(4)
    ]
    paths = {start.communicate(timeout=120)[0] for start in starts}
    assert len(paths) == 1 and all(start.returncode == 0 for start in starts)
    linked = [call for call in (tmp_path / "calls").read_text().splitlines() if "-shared" in call]
    assert len(linked) == 1, linked


def test_processes_of_two_machines_with_one_number_share_a_cache(cache, monkeypatch):
    """As those of two containers: each copies to a name of its own, and the first file stays for who has it mapped."""

    def no_locks(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", no_locks)
    real, inner = build.compiled, []

    def compiled(*arguments):
        made = real(*arguments)
        if not inner:  # meanwhile the other one does all of its work
            inner.append(made)
            with build.built("avx2") as path:
                inner.append(path.stat().st_ino)
        return made

    monkeypatch.setattr(build, "compiled", compiled)
    monkeypatch.setattr(os, "getpid", lambda: 7)
    with build.built("avx2") as path:
        assert build.is_whole(path) and path.stat().st_ino == inner[1]
    assert list(cache.iterdir()) == [path]


def test_a_file_system_without_links_gets_a_whole_file_too(cache, monkeypatch):
    def no_links(*_):
        raise PermissionError(errno.EPERM, "no links here")

    monkeypatch.setattr(os, "link", no_links)
    with build.built("avx2") as path:
        assert build.is_whole(path) and list(cache.iterdir()) == [path]


def test_what_a_process_left_that_ended_while_it_copied_is_removed(cache):
    cache.mkdir(parents=True, mode=0o700)
    old, young = cache / "kernels-avx2-0.1.part", cache / "kernels-avx2-0.2.part"
    for part in (old, young):
        part.write_bytes(b"half of it")
    os.utime(old, (0, 0))
    with build.built("avx2") as path:
        assert set(cache.iterdir()) == {path, young}


def test_a_full_disk_costs_the_cache_and_not_the_kernels(cache, monkeypatch, caplog):
    def full(source, target):
        Path(target).write_bytes(b"so much")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with build.built("avx2") as path:
        assert cache not in path.parents and ctypes.CDLL(str(path)).quartet_one
    assert list(cache.iterdir()) == [] and "No space left on device" in caplog.text


def test_a_compiler_whose_words_are_no_utf8_is_quoted(cache, tmp_path, monkeypatch):
    failing = tmp_path / "bin" / "gcc"
    failing.parent.mkdir()
    failing.write_bytes(b"#!/bin/sh\nprintf 'unbekannt f\\374r' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(build.CompilerRefused, match="unbekannt f"), build.built("avx2"):
        pass


def test_a_damaged_file_is_compiled_again(cache):
    with build.built("avx2") as path:
        pass
    path.write_bytes(b"no library")
    assert library.functions.__wrapped__("avx2").quartet_one


def zeroed(content):
    """With a page that was never written."""
    return content[:4096] + bytes(4096) + content[8192:]


@pytest.mark.parametrize("damage", [lambda content: content[:9000], lambda content: content[:-1], zeroed])
def test_a_file_that_lost_bytes_is_compiled_again_before_the_loader_sees_it(damage, cache):
    """The loader maps a file as it is: what is missing ends the process, by a signal."""
    with build.built("avx2") as path:
        whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with build.built("avx2") as again:
        assert again == path and build.is_whole(path)
        assert ctypes.CDLL(str(path)).quartet_one


@pytest.mark.parametrize("mode", [0o777, 0o770])
def test_a_cache_that_others_can_write_to_is_not_used_and_the_log_says_so(mode, cache, caplog):
    cache.mkdir(parents=True)
    cache.chmod(mode)
    with build.built("avx2") as path:
        assert cache not in path.parents
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()
    assert f"cannot be kept in {cache}" in caplog.text and f"mode {mode:o}" in caplog.text


def test_a_cache_that_nobody_can_write_to_is_read(cache, monkeypatch):
    with build.built("avx2") as path:
        pass
    monkeypatch.setattr(build, "is_kept", lambda *_: pytest.fail("written"))
    cache.chmod(0o500)
    with build.built("avx2") as again:
        assert again == path


def test_without_a_place_for_the_cache_the_file_is_compiled_for_this_process(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with build.built("avx2") as path:
        assert path.is_file()
    assert not path.exists()


def test_another_compiler_or_other_sources_give_another_name(tmp_path, monkeypatch):
    found = build.compiler()
    before = build.fingerprint(found)
    other = tmp_path / "gcc"
    other.write_text("")
    assert build.fingerprint(str(other)) != before
    (tmp_path / "one.c").write_text("int one;")
    monkeypatch.setattr(build, "SOURCES", tmp_path)
    assert build.fingerprint(found) != before


def test_a_missing_compiler_is_the_reason_of_the_error(cache, monkeypatch):
    monkeypatch.setenv("PATH", str(cache))
    assert not build.is_possible()
    with pytest.raises(build.CannotBuild, match="gcc"), build.built("avx2"):
        pass


def test_the_error_quotes_the_compiler(cache, tmp_path, monkeypatch):
    failing = tmp_path / "bin" / "gcc"
    failing.parent.mkdir()
    failing.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(build.CompilerRefused, match="no such instruction"), build.built("avx2"):
        pass
    assert list(Path(cache).iterdir()) == []


def test_a_compiler_that_does_not_know_an_instruction_set_compiles_the_one_below(monkeypatch, caplog):
    real = library.functions

    def functions(name):
        if name == "amx":
            raise build.CompilerRefused("unknown target: amx-tile")
        return real(name)

    monkeypatch.setattr(library, "functions", functions)
    monkeypatch.setattr(library, "candidates", lambda: ["amx", "avx2"])
    found = library.load()
    assert found is not None and found.instruction_set == "avx2"
    assert "for amx cannot be compiled" in caplog.text and "unknown target: amx-tile" in caplog.text
