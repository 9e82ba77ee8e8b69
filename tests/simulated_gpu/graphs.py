"""CUDA graphs: what is captured is written down and not done; a replay does it on the addresses of the capture."""

import weakref
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves, tree_map_only, tree_unflatten

from tests.simulated_gpu import streams
from tests.simulated_gpu.memory import Memory, poison
from tests.simulated_gpu.streams import HERE, LOCK, Stream
from tests.simulated_gpu.tensors import UNWRITTEN, DeviceTensor, fresh

FREED = "a recorded step names memory that has been freed since"
MOVED = "a recorded step names memory that has another address now"


class Pool:
    """Memory that graphs share: whatever one of them leaves there is gone when another one runs."""

    def __init__(self) -> None:
        self.memories: weakref.WeakSet[Memory] = weakref.WeakSet()

    def poison(self) -> None:
        for memory in self.memories:
            poison(memory.whole)


class CUDAGraph:
    """What was captured: its work in order, and the memory that it names."""

    def __init__(self, keep_graph: bool = False) -> None:
        self.nodes: list[Callable[[], None]] = []
        self._named: dict[weakref.ref[Memory], int] = {}  # memory from before the capture → how often it had moved
        self._owned: set[Memory] = set()
        self._pool: Pool | None = None

    def capture_begin(self, pool: Pool | None = None, capture_error_mode: str = "global") -> None:
        streams.refuse_capture("CUDAGraph.capture_begin")
        self._pool = pool or Pool()
        HERE.capture = self

    def capture_end(self) -> None:
        HERE.capture = None

    def reset(self) -> None:
        self.nodes, self._named, self._owned = [], {}, set()

    def pool(self) -> Pool | None:
        return self._pool

    def replay(self) -> None:
        streams.refuse_capture("CUDAGraph.replay")
        assert self._pool is not None, "nothing was captured"
        with LOCK, torch.inference_mode():
            for memory, moves in self._named.items():
                check(memory(), moves)
            self._pool.poison()
            for node in self.nodes:
                node()

    # during the capture

    def own(self, memory: Memory) -> None:
        """Memory that is taken during the capture stays as long as the graph."""
        assert self._pool is not None
        self._owned.add(memory)
        self._pool.memories.add(memory)

    def frozen(self, leaves: Iterable[Any]) -> list[Any]:
        """Arguments as they are at a replay: addresses, and numbers of the host as they are now."""
        found = []
        for leaf in leaves:
            if isinstance(leaf, DeviceTensor):
                if leaf.memory not in self._owned:
                    self._named[weakref.ref(leaf.memory)] = leaf.memory.moves
                leaf = leaf.inner
            elif isinstance(leaf, torch.Tensor):
                leaf = leaf.clone()
            found.append(leaf)
        return found

    def record(self, func: Any, leaves: list[Any], spec: Any) -> Any:
        """Note an operation of torch. Its results are there, with nothing in them."""
        likes = [zeros_like(x.inner) if isinstance(x, DeviceTensor) else x for x in leaves]
        args, kwargs = tree_unflatten(likes, spec)
        made = func(*args, **kwargs)
        given = {id(like): x for like, x in zip(likes, leaves, strict=True) if isinstance(x, DeviceTensor)}
        results = tree_map_only(torch.Tensor, lambda like: result(given.get(id(like)), like), made)
        if func.overloadpacket not in UNWRITTEN:
            targets = [x.inner for x in tree_leaves(results) if isinstance(x, DeviceTensor)]
            self.nodes.append(repeated(func, *tree_unflatten(self.frozen(leaves), spec), targets))
        return results


def check(memory: Memory | None, moves: int) -> None:
    if memory is None:
        raise RuntimeError(FREED)
    if memory.moves != moves:
        raise RuntimeError(MOVED)


def zeros_like(inner: torch.Tensor) -> torch.Tensor:
    """What an operation is tried on to learn the shapes of its results: zeros are valid as indices, too."""
    return torch.empty_strided(inner.shape, inner.stride(), dtype=inner.dtype).zero_()


def result(given: DeviceTensor | None, like: torch.Tensor) -> DeviceTensor:
    """What an operation gives: one of its arguments, where `given`, or memory of its own."""
    if given is not None:
        if given.shape == like.shape:
            return given
        return DeviceTensor(given.inner.resize_(like.shape), given.memory)
    inner = torch.empty_strided(like.shape, like.stride(), dtype=like.dtype)
    poison(inner)
    return fresh(inner)


def repeated(func: Any, args: Any, kwargs: Any, targets: list[torch.Tensor]) -> Callable[[], None]:
    """What does an operation once more, its results in the same places."""

    def node() -> None:
        made = [x for x in tree_leaves(func(*args, **kwargs)) if isinstance(x, torch.Tensor)]
        for target, value in zip(targets, made, strict=True):
            if target is not value:
                target.copy_(value)

    return node


class Capturing:
    """torch.cuda.graph: what is put in line in this block goes into a graph."""

    def __init__(
        self, graph: CUDAGraph, pool: Pool | None = None, stream: Any = None, capture_error_mode: str = "global"
    ) -> None:
        self.graph, self.pool, self.mode = graph, pool, capture_error_mode
        self.stream = stream or Stream()

    def __enter__(self) -> None:
        streams.synchronize()
        self.stream.__enter__()
        self.graph.capture_begin(self.pool, self.mode)

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.graph.capture_end()
        self.stream.__exit__(kind, error, trace)
        if error is not None:
            self.graph.reset()
