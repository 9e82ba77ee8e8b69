"""Into how many parts sequences are divided that share keys: no thread waits for another one longer than it must."""

import ctypes
import subprocess

import pytest

from quartet.kernels.cpu.native import build

FIND = '#include "parts.h"\nint64_t find(int64_t a, int64_t b, int64_t c, int64_t d, int64_t e, int64_t f) '
FIND += "{ return parts_for(a, b, c, d, e, f); }\n"

pytestmark = pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")


@pytest.fixture(scope="module")
def parts_for(tmp_path_factory):
    directory = tmp_path_factory.mktemp("parts")
    source, library = directory / "find.c", directory / "find.so"
    source.write_text(FIND)
    found = build.compiler()
    assert found is not None
    subprocess.run([found, "-shared", "-fPIC", f"-I{build.SOURCES}", "-o", str(library), str(source)], check=True)
    find = ctypes.CDLL(str(library)).find
    find.argtypes, find.restype = [ctypes.c_int64] * 6, ctypes.c_int64

    def parts(count, group, kv_heads, keys, own_keys, threads):
        return find(count, group, kv_heads, keys, own_keys * count, threads)

    return parts


@pytest.mark.parametrize("count", [4, 5, 6, 7])
def test_one_head_of_keys_occupies_both_threads(parts_for, count):
    """A short beginning in common, long contexts behind it: a single part would leave one thread idle."""
    assert parts_for(count, 4, 1, 128, 4096, 2) == 2


def test_as_many_threads_as_there_are_work_on_few_sequences(parts_for):
    assert parts_for(8, 7, 2, 128, 4096, 16) == 8, "each alone: 16 tasks"
    assert parts_for(4, 4, 8, 128, 4096, 16) == 2


@pytest.mark.parametrize("threads", [1, 2, 16])
def test_what_costs_most_is_read_together(parts_for, threads):
    """The keys that are shared are most of what there is to read, so no part is smaller than a tile is worth."""
    for count in (4, 8, 16, 64):
        for kv_heads in (1, 2, 8):
            parts = parts_for(count, 4, kv_heads, 2048, 100, threads)
            assert count / parts >= 4, (count, kv_heads)


def test_a_part_has_room_in_a_workspace(parts_for):
    for group in range(1, 17):
        for count in (4, 7, 33, 257, 1000):
            for threads in (1, 2, 64):
                for own in (1, 100, 5000):
                    parts = parts_for(count, group, 2, 256, own, threads)
                    assert 1 <= parts <= count and -(-count // parts) * group <= 256, (group, count, threads, own)
