"""Huge pages for what products read: with pages of 4 KB, looking up addresses takes a twentieth of a single stream."""

import ctypes
import functools
import mmap
from collections.abc import Callable

import torch

LEAST = 2 << 20  # bytes of a huge page: less holds no whole one
ADVICE: int | None = getattr(mmap, "MADV_HUGEPAGE", None)  # of Linux


def in_huge_pages(memory: torch.Tensor) -> torch.Tensor:
    """Have the system take huge pages for memory that is not written yet, and return it.

    Only where the machine lets each program choose (`madvise` in /sys/kernel/mm/transparent_hugepage/enabled) does this
    change anything. It is advice: where it is refused the memory is as good, and slower.
    """
    if memory.nbytes >= LEAST and ADVICE is not None and (advise := madvise()) is not None:
        begin = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        end = -(-(memory.data_ptr() + memory.nbytes) // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(begin, end - begin, ADVICE)
    return memory


@functools.cache
def madvise() -> Callable[[int, int, int], int] | None:
    """The C library's function, where it has one."""
    function = getattr(ctypes.CDLL(None), "madvise", None)
    if function is not None:
        function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
