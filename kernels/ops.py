"""Which implementation of the fused operations a model runs on, decided once when it is loaded.

    ops = resolve("cuda", "auto")     # Triton's
    ops.gemv(x, weight, bias, residual, out)

Nothing is dispatched per call: the fields are the functions themselves.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from typing import Literal

Implementation = Literal["auto", "torch", "triton"]
Op = Callable[..., None]


@dataclass(frozen=True, slots=True)
class Ops:
    """Every fused operation; the one in torch is its specification."""

    rms_norm: Op
    gated_activation: Op
    gemv: Op
    norm_gate_up: Op
    skinny: Op
    skinny_gated: Op
    norm_qkv_rope_kv: Op
    rope_kv: Op
    paged_decode: Op
    paged_extend: Op
    router: Op
    choose_experts: Op
    expert_gate_up: Op
    expert_down: Op
    align_experts: Op
    expert_gemm: Op
    expert_sum: Op
    lm_head_sample: Op
    process_logits: Op
    draw: Op
    select: Op
    prepare: Op


NORM = ("rms_norm", "gated_activation")
FEW_TOKENS = ("gemv", "norm_gate_up")
SKINNY = ("skinny", "skinny_gated")
ROPE = ("norm_qkv_rope_kv", "rope_kv")
MOE_DECODE = ("router", "choose_experts", "expert_gate_up", "expert_down")
MOE_BATCH = ("align_experts", "expert_gemm", "expert_sum")
HEAD = ("lm_head_sample", "draw")
SAMPLING = ("process_logits", "select")
PREPARE = ("prepare",)

# module → the operations it has
TORCH = {
    "quartet.kernels.reference.operations": (*NORM, *FEW_TOKENS, *SKINNY, *ROPE, "paged_decode", "paged_extend"),
    "quartet.kernels.reference.moe": (*MOE_DECODE, *MOE_BATCH),
    "quartet.kernels.reference.sampling": (*HEAD, *SAMPLING),
    "quartet.kernels.reference.prepare": PREPARE,
}
TRITON = {
    "quartet.kernels.triton.norm": NORM,
    "quartet.kernels.triton.gemv": FEW_TOKENS,
    "quartet.kernels.triton.skinny": SKINNY,
    "quartet.kernels.triton.rope": ROPE,
    "quartet.kernels.triton.attention_decode": ("paged_decode",),
    "quartet.kernels.triton.attention_extend": ("paged_extend",),
    "quartet.kernels.triton.moe_decode": MOE_DECODE,
    "quartet.kernels.triton.moe_batch": MOE_BATCH,
    "quartet.kernels.triton.lm_head": HEAD,
    "quartet.kernels.triton.sampling": SAMPLING,
    "quartet.kernels.triton.prepare": PREPARE,
}


# Triton kernels of a decode step that can load weights while the kernel before them still runs.
DEPENDENT = ("norm_qkv_rope_kv", "paged_decode", "gemv", "norm_gate_up")


def resolve(device_type: str, implementation: Implementation = "auto", dependent: bool = False) -> Ops:
    """The operations for a device: Triton's on CUDA, else torch's, unless one is named ("torch", to find out who errs).

    Triton is imported here and nowhere else, so it need not be installed for torch's. With `dependent` its kernels of
    a decode step are launched ahead of their inputs; weights must then change before an earlier kernel of the stream.
    """
    if implementation == "auto":
        implementation = "triton" if device_type == "cuda" else "torch"
    if dependent and implementation != "triton":
        raise ValueError("dependent launches need the triton backend")
    families = {"torch": TORCH, "triton": TRITON}[implementation]
    found = {op: getattr(import_module(module), op) for module, ops in families.items() for op in ops}
    if dependent:
        found.update({op: partial(found[op], dependent=True) for op in DEPENDENT})
    return Ops(**found)
