"""Triton kernels that can be compiled before they are needed, many at once.

    with compiling(threads) as compilers:
        step()                  # launches nothing: the kernels that it would launch are compiled
    compilers.kernels           # so many, ready to be launched

The wrappers make the same arguments as later, so later launches find these kernels. Compilers leave the interpreter's
lock free for most of their time; the C compiler that Triton 3.6 starts for every launcher is a process of its own.
"""

import gc
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import triton
from triton import knobs

try:  # not public yet
    from triton.runtime._async_compile import AsyncCompileMode
except ImportError:
    AsyncCompileMode = None

INTERPRETED: bool = knobs.runtime.interpret
COMPILES_AHEAD = AsyncCompileMode is not None and not INTERPRETED


class CompileError(RuntimeError):
    """A kernel that cannot be compiled or loaded; the message begins with its name."""


@dataclass(slots=True)
class Compilers:
    """What Triton submits kernels to."""

    pool: ThreadPoolExecutor
    launching: str = ""  # the kernel whose launch is being left out
    kernels: int = 0
    errors: list[CompileError] = field(default_factory=list)

    def submit(self, compile_one: Callable[[], Any]) -> Future[Any]:
        self.kernels += 1
        return self.pool.submit(self.make_ready, self.launching, compile_one)

    def make_ready(self, name: str, compile_one: Callable[[], Any]) -> Any:
        """Compile a kernel, make its launcher and load it."""
        try:
            kernel = compile_one()
            _ = kernel.run  # makes and loads
        except Exception as error:
            failure = CompileError(f"{name}: {error}")
            self.errors.append(failure)
            raise failure from error
        return kernel


COMPILERS: ContextVar[Compilers | None] = ContextVar("compilers", default=None)


class Kernel(triton.JITFunction):
    """A kernel whose launches are left out while its thread is `compiling`."""

    def run(self, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if compilers := COMPILERS.get():
            compilers.launching, warmup = self.__name__, True
        return super().run(*arguments, grid=grid, warmup=warmup, **options)


kernel = triton.jit if INTERPRETED else Kernel  # decorates what is launched; what kernels call is `triton.jit`


@contextmanager
def without_collections() -> Iterator[None]:
    """In Python 3.11 a collection inside `ast.parse` may let another thread in, and both then lose count and raise."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def compiling(threads: int) -> Iterator[Compilers]:
    """Compile what the block would launch, and launch nothing. Ends when all is compiled; raises CompileError."""
    assert COMPILES_AHEAD
    with without_collections(), ThreadPoolExecutor(threads, "compile") as pool:
        compilers = Compilers(pool)
        before = COMPILERS.set(compilers)
        try:
            with AsyncCompileMode(compilers, ignore_errors=True):  # they are raised below, once all threads have ended
                yield compilers
        finally:
            COMPILERS.reset(before)
    if compilers.errors:
        raise compilers.errors[0]
