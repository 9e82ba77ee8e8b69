"""All operations of kernels.operations.Ops as Triton kernels."""

from quartet.kernels.triton.adapters import adapter_expand, adapter_shrink
from quartet.kernels.triton.attention_decode import paged_decode
from quartet.kernels.triton.attention_extend import paged_extend
from quartet.kernels.triton.gemv import gemv, norm_gate_up
from quartet.kernels.triton.lm_head import draw, lm_head_sample
from quartet.kernels.triton.moe_batch import align_experts, expert_gemm, expert_sum
from quartet.kernels.triton.moe_decode import choose_experts, expert_down, expert_gate_up, router
from quartet.kernels.triton.norm import gated_activation, rms_norm
from quartet.kernels.triton.prepare import prepare
from quartet.kernels.triton.recurrent import convolve_row, delta_update, space_update
from quartet.kernels.triton.rope import norm_qkv_rope_kv, rope_kv
from quartet.kernels.triton.sampling import process_logits, select
from quartet.kernels.triton.skinny import skinny, skinny_gated

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
