"""Allocations of the device and page-locked memory of the host: poisoned until somebody writes to them."""

import math
import threading
import weakref

import numpy
import torch

TOTAL_BYTES = 4 << 30  # of the device
BYTES = {torch.uint8: 0xFF, torch.bool: True}  # bytes that are read as numbers of another dtype are NaN, or -1


@torch.inference_mode()
def poison(tensor: torch.Tensor) -> None:
    """Overwrite with what nobody mistakes for a result: NaN, or integers that are no index."""
    dtype = tensor.dtype
    if dtype.is_floating_point or dtype.is_complex:
        tensor.fill_(math.nan)
    else:
        tensor.fill_(BYTES.get(dtype, int.from_bytes(b"\x7f" * dtype.itemsize, "little")))


class Memory:
    """One allocation of the device: the storage of a tensor of the host. It is what `untyped_storage()` gives."""

    used_bytes = 0  # of all that live
    _lock = threading.RLock()

    def __init__(self, inner: torch.Tensor) -> None:
        """Take the storage of a tensor that nobody else holds."""
        self.whole = inner
        self.moves = 0  # how often its address has changed
        self._held = 0
        self._account(self.nbytes())

    def __del__(self) -> None:
        self._account(0)

    def _account(self, nbytes: int) -> None:
        with Memory._lock:
            if Memory.used_bytes - self._held + nbytes > TOTAL_BYTES and nbytes > self._held:
                raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {nbytes} bytes (simulated).")
            Memory.used_bytes += nbytes - self._held
            self._held = nbytes

    def nbytes(self) -> int:
        return self.whole.untyped_storage().nbytes()

    size = nbytes

    def data_ptr(self) -> int:
        return self.whole.untyped_storage().data_ptr()

    def resize_(self, nbytes: int) -> "Memory":
        """Give the memory back, or take it anew: elsewhere, with undefined contents."""
        self._account(nbytes)
        self.whole.untyped_storage().resize_(nbytes)
        self.moves += 1
        if nbytes:
            poison(self.whole)
        return self

    @property
    def released(self) -> bool:
        return self.nbytes() < self.whole.nbytes


class PinnedMemory:
    """Which memory of the host is page-locked. A block counts until the last tensor in it is gone."""

    def __init__(self) -> None:
        self._blocks: dict[int, int] = {}  # address → how often

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        block = numpy.empty(max(1, math.prod(shape)) * dtype.itemsize, dtype=numpy.uint8)
        address = block.ctypes.data
        self._blocks[address] = self._blocks.get(address, 0) + 1
        weakref.finalize(block, self._forget, address)
        tensor = torch.from_numpy(block).view(dtype)[: math.prod(shape)].view(shape)
        poison(tensor)
        return tensor

    def _forget(self, address: int) -> None:
        self._blocks[address] -= 1
        if not self._blocks[address]:
            del self._blocks[address]

    def holds(self, tensor: torch.Tensor) -> bool:
        return tensor.device.type == "cpu" and tensor.untyped_storage().data_ptr() in self._blocks


PINNED = PinnedMemory()
