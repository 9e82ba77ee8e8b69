"""The operations of kernels/ops.py in plain torch, each launched as one kernel: quick enough for whole requests.

`kernels/ops.py` looks its functions up here by name. How they are launched is not tested then; that they may be
captured, and what surrounds them, is.
"""

from collections.abc import Callable
from typing import Any

import torch

from quartet.kernels import ops
from tests.simulated_gpu.launches import inner, refuse_hosts
from tests.simulated_gpu.streams import HERE
from tests.simulated_gpu.tensors import refuse_released

TRITON = ops.MODULES["triton"]


def launched(name: str) -> Callable[..., None]:
    operation = getattr(ops.resolve("cpu", "torch"), name)

    def launch(*args: Any, dependent: bool = False, **kwargs: Any) -> None:
        values = [*args, *kwargs.values()]
        refuse_hosts(values)
        refuse_released(name, values)
        values = inner(values) if HERE.capture is None else HERE.capture.frozen(values)

        @torch.inference_mode()
        def run() -> None:
            operation(*values[: len(args)], **dict(zip(kwargs, values[len(args) :], strict=True)))

        run() if HERE.capture is None else HERE.capture.nodes.append(run)

    return launch


globals().update({name: launched(name) for name in ops.OPERATIONS})


def install() -> None:
    """Have these stand for Triton's kernels."""
    ops.MODULES["triton"] = __name__
