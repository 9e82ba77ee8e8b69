"""Which implementation of the fused operations a model runs on, decided once when it is loaded.

    ops = resolve("cuda", "auto")     # Triton's
    ops.gemv(x, weight, bias, residual, out)

Nothing is dispatched per call: the fields are the functions themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields
from importlib import import_module
from typing import Literal

Backend = Literal["auto", "torch", "triton"]
Op = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Ops:
    """Every fused operation; kernels/torch_ops.py is the specification of each."""

    add_rms_norm: Op
    gated_activation: Op
    gemv: Op
    norm_gate_up: Op
    skinny: Op
    skinny_gated: Op
    norm_qkv_rope_kv: Op
    rope_kv: Op
    paged_decode: Op
    paged_extend: Op


FAMILIES = {
    "kernels.triton_norm": ("add_rms_norm", "gated_activation"),
    "kernels.triton_gemv": ("gemv", "norm_gate_up"),
    "kernels.triton_skinny": ("skinny", "skinny_gated"),
    "kernels.triton_rope": ("norm_qkv_rope_kv", "rope_kv"),
    "kernels.triton_attention_decode": ("paged_decode",),
    "kernels.triton_attention_extend": ("paged_extend",),
}


def resolve(device_type: str, backend: Backend = "auto") -> Ops:
    """The operations for a device. Triton's where it has one to run on; "torch" on any device, to find out who errs."""
    if backend == "auto":
        backend = "triton" if device_type == "cuda" else "torch"
    return triton_ops() if backend == "triton" else torch_ops()


def torch_ops() -> Ops:
    module = import_module("kernels.torch_ops")
    return Ops(**{field.name: getattr(module, field.name) for field in fields(Ops)})


def triton_ops() -> Ops:
    """Imports triton, so it is called only where that is installed."""
    return Ops(**{op: getattr(import_module(module), op) for module, ops in FAMILIES.items() for op in ops})
