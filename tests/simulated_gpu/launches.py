"""Triton's kernels on the simulated device: interpreted, and recorded during a capture.

Their pointers are checked, which a device does not do: a kernel may only touch the memory of its arguments.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import numpy
import torch
from triton.runtime import interpreter

from tests.simulated_gpu.memory import PINNED
from tests.simulated_gpu.streams import HERE, LOCK
from tests.simulated_gpu.tensors import DeviceTensor, refuse_released

HOST_POINTER = "Pointer argument (at {}) cannot be accessed from Triton (cpu tensor?)"
FIRST_IN_CAPTURE = "{} is launched for the first time during a capture: it cannot be compiled and loaded there"
OUTSIDE = "an illegal memory access was encountered: {} at {} addresses outside of the kernel's arguments"

plain_call = interpreter.GridExecutor.__call__
plain_memory = interpreter._interpreter
loaded: set[Any] = set()  # kernels with what they are compiled for


def launch(executor: interpreter.GridExecutor, *args: Any, **kwargs: Any) -> None:
    """kernel[grid](*args, **kwargs)"""
    refuse_hosts(args)
    refuse_released(executor.fn.__name__, [*args, *kwargs.values()])
    key = compiled_for(executor, args)
    if HERE.capture is None:
        loaded.add(key)
        run(executor, inner(args), inner(kwargs.values()), kwargs)
        return
    if key not in loaded:
        raise RuntimeError(FIRST_IN_CAPTURE.format(executor.fn.__name__))
    values, named = HERE.capture.frozen(args), HERE.capture.frozen(kwargs.values())
    HERE.capture.nodes.append(lambda: run(executor, values, named, kwargs))


def run(executor: interpreter.GridExecutor, args: list[Any], named: list[Any], kwargs: dict[str, Any]) -> None:
    with LOCK, within([x for x in [*args, *named] if isinstance(x, torch.Tensor)]):
        plain_call(executor, *args, **dict(zip(kwargs, named, strict=True)))


def inner(values: Any) -> list[Any]:
    return [x.inner if isinstance(x, DeviceTensor) else x for x in values]


def refuse_hosts(args: Any) -> None:
    for place, x in enumerate(args):
        if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor) and not PINNED.holds(x):
            raise ValueError(HOST_POINTER.format(place))


def compiled_for(executor: interpreter.GridExecutor, args: Any) -> Any:
    """What Triton compiles a kernel anew for."""
    return executor.fn, tuple(
        specialised(x, name in executor.constexprs) for name, x in zip(executor.arg_names, args, strict=False)
    )


def specialised(x: Any, constant: bool) -> Any:
    if isinstance(x, torch.Tensor):
        return x.dtype, x.data_ptr() % 16 == 0
    if constant or not isinstance(x, int):
        return x if constant or x is None else type(x)
    return x == 1, x % 16 == 0, x >= 1 << 31


class Bounds:
    """The addresses that the running kernel may touch: (first, last + 1) of each argument's memory, ascending."""

    firsts = numpy.zeros(0, dtype=numpy.uint64)
    ends = numpy.zeros(0, dtype=numpy.uint64)


@contextmanager
def within(tensors: list[torch.Tensor]) -> Iterator[None]:
    storages = [x.untyped_storage() for x in tensors]
    spans = sorted({(s.data_ptr(), s.data_ptr() + s.nbytes()) for s in storages})
    before = Bounds.firsts, Bounds.ends
    Bounds.firsts, Bounds.ends = (numpy.array(column, dtype=numpy.uint64) for column in zip(*spans, strict=True))
    try:
        yield
    finally:
        Bounds.firsts, Bounds.ends = before


def check(what: str, pointers: numpy.ndarray, mask: Any) -> None:
    touched = pointers[mask] if mask is not None else pointers.ravel()
    if not touched.size:
        return
    place = numpy.searchsorted(Bounds.firsts, touched, side="right") - 1
    outside = (place < 0) | (touched >= Bounds.ends[place])
    if outside.any():
        raise IndexError(OUTSIDE.format(what, int(outside.sum())))


def checked(what: str, mask_at: int | None, pointer_at: int = 0) -> Callable[..., Any]:
    """The interpreter's access to memory, looked at first."""
    function = getattr(plain_memory, what)

    def access(*args: Any) -> Any:
        check(what, args[pointer_at], None if mask_at is None else args[mask_at])
        return function(*args)

    return access


def install() -> None:
    interpreter.GridExecutor.__call__ = launch
    names = {name: getattr(plain_memory, name) for name in dir(plain_memory) if not name.startswith("__")}
    names.update(load=checked("load", 1), store=checked("store", 2))
    names.update(atomic_rmw=checked("atomic_rmw", 3, 1), atomic_cas=checked("atomic_cas", None))
    interpreter._interpreter = SimpleNamespace(**names)
