"""Compiling the CPU kernels: once for all processes, and never from a place that others can write to."""

import ctypes
import os
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
    monkeypatch.setattr(build, "SOURCES", sources)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "quartet" / "native"


def test_a_second_start_finds_what_the_first_has_compiled(cache, monkeypatch):
    with build.built() as path:
        assert path.parent == cache
        assert ctypes.c_int.in_dll(ctypes.CDLL(str(path)), "quartet_one").value == 1
    monkeypatch.setattr(build, "compiled", lambda *_: pytest.fail("compiled again"))
    with build.built() as again:
        assert again == path
    assert list(cache.iterdir()) == [path], "parts are left"


def test_processes_that_compile_at_once_all_get_a_whole_file(cache):
    code = f"""
import ctypes, pathlib
from quartet.kernels.cpu.native import build, library
build.SOURCES = pathlib.Path({str(build.SOURCES)!r})
with build.built() as path:
    assert ctypes.CDLL(str(path)).quartet_one
"""
    with ThreadPoolExecutor(3) as pool:
        runs = [pool.submit(subprocess.run, [sys.executable, "-c", code], check=False) for _ in range(3)]
    assert [run.result().returncode for run in runs] == [0, 0, 0]
    assert len(list(cache.iterdir())) == 1


def test_a_damaged_file_is_compiled_again(cache):
    with build.built() as path:
        pass
    path.write_bytes(b"no library")
    assert library.functions.__wrapped__().quartet_one


def zeroed(content):
    """With a page that was never written."""
    return content[:4096] + bytes(4096) + content[8192:]


@pytest.mark.parametrize("damage", [lambda content: content[:9000], lambda content: content[:-1], zeroed])
def test_a_file_that_lost_bytes_is_compiled_again_before_the_loader_sees_it(damage, cache):
    """The loader maps a file as it is: what is missing ends the process, by a signal."""
    with build.built() as path:
        whole = path.read_bytes()
    path.write_bytes(damage(whole))
    with build.built() as again:
        assert again == path and build.is_whole(path)
        assert ctypes.CDLL(str(path)).quartet_one


def test_a_cache_that_others_can_write_to_is_not_used(cache):
    cache.mkdir(parents=True)
    cache.chmod(0o777)
    with build.built() as path:
        assert cache not in path.parents
        assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert not path.exists()


def test_without_a_place_for_the_cache_the_file_is_compiled_for_this_process(tmp_path, monkeypatch):
    blocked = tmp_path / "file"
    blocked.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(blocked))
    with build.built() as path:
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
    with pytest.raises(build.CannotBuild, match="gcc"), build.built():
        pass


def test_the_error_quotes_the_compiler(cache, tmp_path, monkeypatch):
    failing = tmp_path / "bin" / "gcc"
    failing.parent.mkdir()
    failing.write_text("#!/bin/sh\necho 'no such instruction' >&2\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setenv("PATH", f"{failing.parent}{os.pathsep}{os.environ['PATH']}")
    with pytest.raises(build.CannotBuild, match="no such instruction"), build.built():
        pass
    assert list(Path(cache).iterdir()) == []
