"""Which implementation of the fused operations (operations.py) a model runs on.

    ops = resolve("cuda", "auto")     # Triton's
    ops.gemv(x, weight, bias, residual, out)

It is chosen once, when a model is loaded. Nothing is dispatched per call: the attributes are the functions themselves.
"""

from functools import partial
from importlib import import_module
from types import SimpleNamespace
from typing import TYPE_CHECKING, Literal, cast

from quartet.kernels.operations import Ops
from quartet.kernels.recurrent_operations import RecurrentOps

if TYPE_CHECKING:
    from quartet.kernels.reference import operations as reference_operations
    from quartet.kernels.triton import operations as triton_operations

    IMPLEMENTATIONS: tuple[Ops, ...] = (reference_operations, triton_operations)  # mypy compares the signatures

Implementation = Literal["auto", "torch", "triton"]

OPERATIONS = tuple(name for kind in (RecurrentOps, Ops) for name in vars(kind) if not name.startswith("_"))
MODULES = {"torch": "quartet.kernels.reference.operations", "triton": "quartet.kernels.triton.operations"}

# Triton kernels of a decode step that can load weights while the kernel before them still runs.
DEPENDENT = ("norm_qkv_rope_kv", "paged_decode", "gemv", "norm_gate_up")


def resolve(device_type: str, implementation: Implementation = "auto", dependent: bool = False) -> Ops:
    """The operations for a device: Triton's on CUDA, else torch's, unless one is named ("torch" helps to find a fault).

    Triton is imported here and nowhere else, so torch's operations do not need it. With `dependent` the kernels of a
    decode step begin before their inputs are ready (programmatic dependent launch); weights must then change before an
    earlier kernel of the stream. Raises KeyError for an unknown implementation, ValueError for `dependent` with torch.
    """
    if implementation == "auto":
        implementation = "triton" if device_type == "cuda" else "torch"
    if dependent and implementation != "triton":
        raise ValueError("dependent launches need the triton backend")
    module = import_module(MODULES[implementation])
    if not dependent:
        return cast(Ops, module)
    found = {name: getattr(module, name) for name in OPERATIONS}
    found.update({name: partial(found[name], dependent=True) for name in DEPENDENT})
    return cast(Ops, SimpleNamespace(**found))
