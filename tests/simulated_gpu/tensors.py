"""Tensors of the simulated device: each holds one of the host, and lets nobody mistake it for one."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from tests.simulated_gpu import streams
from tests.simulated_gpu.memory import PINNED, Memory, poison
from tests.simulated_gpu.streams import HERE

CUDA = torch.device("cuda:0")
TWO_DEVICES = "Expected all tensors to be on the same device, but found at least two devices, cuda:0 and cpu! ({})"
NO_NUMPY = "can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() to copy the tensor to host memory first."
GIVEN_BACK = "CUDA error: an illegal memory access was encountered ({} reads or writes memory that was given back)"

aten = torch.ops.aten
UNWRITTEN = {aten.empty_like, aten.new_empty, aten.new_empty_strided, aten.empty, aten.empty_strided}
WAITING = {  # for the result's size, or for a number
    aten._local_scalar_dense,
    aten.equal,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_consecutive,
    aten.unique_dim,
    aten.bincount,
}


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device."""

    inner: torch.Tensor  # the same on the host
    memory: Memory
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, inner: torch.Tensor, memory: Memory) -> "DeviceTensor":
        return torch.Tensor._make_wrapper_subclass(
            cls,
            inner.shape,
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=CUDA,
        )

    def __init__(self, inner: torch.Tensor, memory: Memory) -> None:
        self.inner = inner
        self.memory = memory

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return dispatch(func, args, kwargs or {})

    def __repr__(self, *, tensor_contents: Any = None) -> str:
        return f"DeviceTensor({self.inner})"

    def data_ptr(self) -> int:
        return self.inner.data_ptr()

    def untyped_storage(self) -> Memory:
        return self.memory

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        raise TypeError(NO_NUMPY)

    def __array__(self, dtype: Any = None) -> Any:
        raise TypeError(NO_NUMPY)

    def __getitem__(self, index: Any) -> Any:
        return super().__getitem__(sent(index))

    def __setitem__(self, index: Any, value: Any) -> None:
        super().__setitem__(sent(index), value)

    @property
    def data(self) -> "DeviceTensor":
        return self.detach()

    @data.setter
    def data(self, other: "DeviceTensor") -> None:
        assert self.shape == other.shape and self.dtype == other.dtype, (self.shape, other.shape)
        self.inner, self.memory = other.inner, other.memory


def sent(index: Any) -> Any:
    """An index whose lists are on the device."""
    if isinstance(index, tuple):
        return tuple(map(sent, index))
    return torch.tensor(index).to(CUDA) if isinstance(index, list) else index


@dataclass(frozen=True, slots=True)
class Facts:
    """What the schema of an operation says."""

    view: bool  # it gives other views of its argument's memory and touches no element
    written: tuple[str, ...]  # arguments
    returned: tuple[str | None, ...]  # the argument that each result is


@cache
def facts_of(func: Any) -> Facts:
    arguments, returns = func._schema.arguments, func._schema.returns
    written = tuple(a.name for a in arguments if a.alias_info is not None and a.alias_info.is_write)
    views = [r.alias_info is not None and not r.alias_info.is_write for r in returns]
    returned = []
    for result in returns:
        same = [
            a.name
            for a in arguments
            if a.alias_info and result.alias_info and a.alias_info.before_set & result.alias_info.before_set
        ]
        returned.append(same[0] if same else None)
    return Facts(any(views) and not written, written, tuple(returned))


def dispatch(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """One operation of torch with at least one tensor of the device."""
    if func._can_decompose():
        result = func.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
    special = SPECIAL.get(func.overloadpacket)
    return execute(func, args, kwargs) if special is None else special(func, args, kwargs)


def make(func: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation that makes a tensor on the device out of nothing: what torch calls for device="cuda"."""
    assert func.overloadpacket in UNWRITTEN, f"the simulated device does not know {func}"
    inner = func(*args, **{**kwargs, "device": "cpu", "pin_memory": False})
    made = fresh(inner)
    poison(inner)
    return made


def fresh(inner: torch.Tensor) -> DeviceTensor:
    """A tensor with memory of its own."""
    memory = Memory(inner)
    if HERE.capture is not None:
        HERE.capture.own(memory)
    return DeviceTensor(inner, memory)


def execute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """Do it on the inner tensors, or record it."""
    device = kwargs.get("device")
    if device is not None:
        if torch.device(device).type == "cpu":  # a tensor of the host in the likeness of one of the device
            return func(*tree_map_only(DeviceTensor, lambda x: torch.empty_like(x.inner), args), **kwargs)
        kwargs = {**kwargs, "device": "cpu"}
    leaves, spec = tree_flatten((args, kwargs))
    refuse_mixture(func, leaves)
    facts = facts_of(func)
    if not facts.view:
        refuse_released(func, leaves)
        if HERE.capture is not None:
            return HERE.capture.record(func, leaves, spec)
    args, kwargs = tree_unflatten([x.inner if isinstance(x, DeviceTensor) else x for x in leaves], spec)
    with torch.inference_mode():  # inner tensors have no history
        result = func(*args, **kwargs)
    if func.overloadpacket in UNWRITTEN:
        poison(result)
    return wrapped(result, [x for x in leaves if isinstance(x, DeviceTensor)], facts.view)


def wrapped(result: Any, among: list[DeviceTensor], view: bool) -> Any:
    """The result as tensors of the device; `among`: those of the arguments, which it may be or share memory with."""

    def one(inner: torch.Tensor) -> DeviceTensor:
        if view:
            with torch.inference_mode(among[0].is_inference()):  # a view is what its base is
                return DeviceTensor(inner, among[0].memory)
        for known in among:
            if known.inner is inner:
                return known if known.shape == inner.shape else DeviceTensor(inner, known.memory)
        address = inner.untyped_storage().data_ptr()
        for known in among:
            if address and known.inner.untyped_storage().data_ptr() == address:
                return DeviceTensor(inner, known.memory)
        return fresh(inner)

    return tree_map_only(torch.Tensor, one, result)


def refuse_mixture(func: Any, leaves: list[Any]) -> None:
    """CUDA takes single numbers of the host in its pointwise operations, and nothing else of it."""
    hosts = [x for x in leaves if isinstance(x, torch.Tensor) and not isinstance(x, DeviceTensor)]
    for host in hosts:
        if host.dim() or not (torch.Tag.pointwise in func.tags or func.overloadpacket in TAKES_NUMBERS):
            raise RuntimeError(TWO_DEVICES.format(func))


def refuse_released(func: Any, leaves: list[Any]) -> None:
    for tensor in leaves:
        if isinstance(tensor, DeviceTensor) and tensor.memory.released:
            raise RuntimeError(GIVEN_BACK.format(func))


# operations with a way of their own


def copy(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """target.copy_(source), across the border or on the device."""
    target, source, *rest = args
    asynchronous = bool(rest[0] if rest else kwargs.get("non_blocking", False))
    if isinstance(target, DeviceTensor) and isinstance(source, DeviceTensor):
        return execute(func, (target, source), {})
    host, on_device = (source, target) if isinstance(target, DeviceTensor) else (target, source)
    refuse_released(func, [on_device])
    if not target.numel():
        return target
    plain = host.dtype == on_device.dtype and host.shape == on_device.shape and host.is_contiguous()
    asynchronous = asynchronous and plain and PINNED.holds(host)
    with torch.inference_mode():
        if host is source:
            streams.send(on_device.inner, host, asynchronous)
        else:
            streams.fetch(host, on_device.inner, asynchronous)
    return target


def convert(func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
    """tensor.to(...) of a tensor of the device."""
    (tensor,) = args
    device = torch.device(kwargs.get("device") or CUDA)
    if device.type == "cuda":
        return execute(func, args, {k: v for k, v in kwargs.items() if k not in ("device", "non_blocking")})
    dtype = kwargs.get("dtype") or tensor.dtype
    converted = tensor if dtype == tensor.dtype else tensor.to(dtype)  # on the device, as torch does
    asynchronous = bool(kwargs.get("non_blocking"))
    host = PINNED.empty(tensor.shape, dtype) if asynchronous else torch.empty_like(converted.inner)
    return host.copy_(converted, non_blocking=asynchronous)


def after_waiting(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    streams.wait(str(func))
    return execute(func, args, kwargs)


def index(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """x[indices] and x[indices] = values: a mask must be counted first, and indices of the host must be sent."""
    tensor, indices, *rest = args
    masks = any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices)
    filled = bool(rest) and not isinstance(rest[0], DeviceTensor) and rest[0].dim() == 0 and len(indices) == 1
    if masks and not filled:
        streams.wait(f"{func} with a mask")
    if any(i is not None and not isinstance(i, DeviceTensor) for i in indices):
        streams.wait(f"{func} with indices of the host")
        indices = [None if i is None else i.to(CUDA) for i in indices]
    return execute(func, (tensor, indices, *rest), kwargs)


def repeat(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    """repeat_interleave: the size of the result must be known."""
    if kwargs.get("output_size") is None and func is aten.repeat_interleave.Tensor:
        streams.wait(str(func))
    return execute(func, args, kwargs)


TAKES_NUMBERS = {aten.masked_fill, aten.masked_fill_, aten.fill_, aten.index_put_, aten.index_fill_, aten.where}
SPECIAL: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(WAITING, after_waiting),
    aten.copy_: copy,
    aten._to_copy: convert,
    aten.index: index,
    aten.index_put_: index,
    aten.index_put: index,
    aten.repeat_interleave: repeat,
    aten.is_pinned: lambda func, args, kwargs: False,
}
