"""The names of torch and torch.cuda that lead to the simulated device."""

import contextlib
import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch.utils._device import _device_constructors

from tests.simulated_gpu import streams, tensors
from tests.simulated_gpu.graphs import Capturing, CUDAGraph, Pool
from tests.simulated_gpu.memory import PINNED, TOTAL_BYTES, Memory
from tests.simulated_gpu.streams import DEBUGGING, DEFAULT, HERE, Event, Stream

NAME = "Simulated GPU"
PROPERTIES = SimpleNamespace(
    name=NAME, major=9, minor=0, total_memory=TOTAL_BYTES, multi_processor_count=132, L2_cache_size=50 << 20
)
GUARDS = "_ZN3c104impl26device_guard_impl_registryE"  # by device type
CUDA_TYPE, LAZY_TYPE, TYPES = 1, 17, 21
plain_data = torch.Tensor.data
plain = {name: getattr(torch, name) for name in ("tensor", "as_tensor", "empty")}


def set_up_guard() -> None:
    """Have C++ believe that there is a device.

    Torch puts a guard that does nothing in the place of one without devices, but not where there is none at all.
    """
    library = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libc10.so"))
    guards = (ctypes.c_void_p * TYPES).in_dll(library, GUARDS)
    guards[CUDA_TYPE] = guards[LAZY_TYPE]
    torch._C._ensureCUDADeviceGuardSet()


def on_device(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """A maker of tensors from the host's numbers: they are sent as pageable memory."""

    def made(*args: Any, device: Any = None, pin_memory: bool = False, **kwargs: Any) -> torch.Tensor:
        if device is None or torch.device(device).type != "cuda":
            host = make(*args, device=device, **kwargs)
            return pin(host) if pin_memory else host
        if args and isinstance(args[0], tensors.DeviceTensor):
            return args[0].to(**kwargs)
        return make(*args, **kwargs).to(device)

    return made


def empty(*shape: Any, pin_memory: bool = False, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    if not pin_memory:
        return plain["empty"](*shape, dtype=dtype, **kwargs)
    size = plain["empty"](*shape, device="meta").shape
    return PINNED.empty(tuple(size), dtype or torch.get_default_dtype())


def pin(tensor: torch.Tensor, device: Any = None) -> torch.Tensor:
    if isinstance(tensor, tensors.DeviceTensor):
        raise RuntimeError("cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned")
    return tensor if PINNED.holds(tensor) else PINNED.empty(tensor.shape, tensor.dtype).copy_(tensor)


def set_data(tensor: torch.Tensor, value: torch.Tensor) -> None:
    """`tensor.data = value`, also where that moves the tensor to the device: the object stays the same."""
    if isinstance(value, tensors.DeviceTensor):
        moved = tensors.DeviceTensor(value.inner, value.memory)
        torch.utils.swap_tensors(tensor, torch.nn.Parameter(moved, tensor.requires_grad))
    else:
        plain_data.__set__(tensor, value)


def current_stream(device: Any = None) -> Stream:
    return HERE.stream


def stream(chosen: Stream | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if chosen is None else chosen


def memory_info(device: Any = None) -> tuple[int, int]:
    return TOTAL_BYTES - Memory.used_bytes, TOTAL_BYTES


NAMES: dict[str, Any] = {  # a function of its own for each: torch._dynamo knows them by identity
    "is_available": lambda: True,
    "device_count": lambda: 1,
    "current_device": lambda: 0,
    "set_device": lambda device: None,
    "get_device_name": lambda device=None: NAME,
    "get_device_properties": lambda device=None: PROPERTIES,
    "get_device_capability": lambda device=None: (PROPERTIES.major, PROPERTIES.minor),
    "is_bf16_supported": lambda *_, **__: True,
    "_lazy_init": lambda: None,
    "Stream": Stream,
    "Event": Event,
    "stream": stream,
    "current_stream": current_stream,
    "default_stream": lambda device=None: DEFAULT,
    "synchronize": streams.synchronize,
    "set_sync_debug_mode": DEBUGGING.set,
    "get_sync_debug_mode": DEBUGGING.get,
    "CUDAGraph": CUDAGraph,
    "graph": Capturing,
    "graph_pool_handle": Pool,
    "is_current_stream_capturing": lambda: HERE.capture is not None,
    "mem_get_info": memory_info,
    "memory_allocated": lambda device=None: Memory.used_bytes,
    "memory_reserved": lambda device=None: Memory.used_bytes,
    "empty_cache": lambda: None,
}
library = torch.library.Library("_", "IMPL")  # stays as long as the process


def install() -> None:
    """Once in a process, which has no other device from then on."""
    set_up_guard()
    library.fallback(tensors.make, "CUDA")
    _device_constructors()  # what `with torch.device(...)` looks for: those from before
    for name, value in NAMES.items():
        setattr(torch.cuda, name, value)
    torch.tensor, torch.as_tensor, torch.empty = on_device(plain["tensor"]), on_device(plain["as_tensor"]), empty
    torch.nn.Parameter.data = property(plain_data.__get__, set_data)
    torch.Tensor.pin_memory, torch.Tensor.is_pinned = pin, lambda tensor, device=None: PINNED.holds(tensor)
