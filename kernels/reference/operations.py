"""All operations of kernels.operations.Ops in plain torch: the specification of the Triton kernels."""

from quartet.kernels.reference.adapters import adapter_expand, adapter_shrink
from quartet.kernels.reference.dense import (
    gated_activation,
    gemv,
    norm_gate_up,
    norm_qkv_rope_kv,
    paged_decode,
    paged_extend,
    rms_norm,
    rope_kv,
    skinny,
    skinny_gated,
)
from quartet.kernels.reference.moe import (
    align_experts,
    choose_experts,
    expert_down,
    expert_gate_up,
    expert_gemm,
    expert_sum,
    router,
)
from quartet.kernels.reference.prepare import prepare
from quartet.kernels.reference.recurrent_updates import convolve_row, delta_update, space_update
from quartet.kernels.reference.sampling import draw, lm_head_sample, process_logits, select

__all__ = [
    "adapter_expand",
    "adapter_shrink",
    "align_experts",
    "choose_experts",
    "convolve_row",
    "delta_update",
    "draw",
    "expert_down",
    "expert_gate_up",
    "expert_gemm",
    "expert_sum",
    "gated_activation",
    "gemv",
    "lm_head_sample",
    "norm_gate_up",
    "norm_qkv_rope_kv",
    "paged_decode",
    "paged_extend",
    "prepare",
    "process_logits",
    "rms_norm",
    "rope_kv",
    "router",
    "select",
    "skinny",
    "skinny_gated",
    "space_update",
]
