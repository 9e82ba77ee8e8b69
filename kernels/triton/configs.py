"""Block sizes of every kernel, by name: a committed table, nothing is tuned at run time.

The figures follow from arithmetic, and from the registers of the compiled code: 16 bytes per load, at least 64 KB of
weights in flight on each multiprocessor, one wave of programs for a small model. None has been measured on a device.
"""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Tile:
    """How one kernel cuts its work."""

    rows: int = 1  # of the output, for one program
    columns: int = 1024  # summed over at once
    warps: int = 4
    stages: int = 2  # loads ahead of the arithmetic, where the compiler pipelines a loop
    splits: int = 1  # at most so many programs share one output tile and add up in a fixed order


TILES = {
    "rms_norm": Tile(warps=4),
    "gated_activation": Tile(columns=1024),
    "qkv_rope_kv": Tile(rows=4, columns=1024),
    "rope_kv": Tile(rows=8),
    "paged_decode": Tile(rows=16, columns=64, stages=3),
    "paged_extend": Tile(rows=128, columns=64, warps=8, stages=3),
    "paged_extend_wide": Tile(rows=128, columns=32, warps=8, stages=3),
    "gemv": Tile(rows=4, columns=1024),
    "gate_up": Tile(rows=4, columns=1024),
    "skinny": Tile(rows=64, columns=64, stages=5, splits=8),
    "skinny_gated": Tile(rows=64, columns=64, stages=4, splits=4),
    "adapter_shrink": Tile(rows=16, columns=128, stages=4),
    "adapter_expand": Tile(rows=64, columns=64, stages=2),
    "router": Tile(rows=8, columns=1024),
    "expert_gate_up": Tile(rows=4, columns=1024),
    "expert_down": Tile(rows=4, columns=512),
    "align": Tile(columns=1024),
    "expert_gemm": Tile(rows=64, columns=64, stages=4),
    "expert_gemm_wide": Tile(rows=128, columns=64, warps=8, stages=3),
    "expert_sum": Tile(columns=1024),
    "lm_head": Tile(rows=64, columns=64, stages=5),
    "logits": Tile(columns=4096, warps=8),
    "select": Tile(columns=1024, warps=16),
    "prepare": Tile(columns=1024),
    "convolve_row": Tile(columns=512),
    "state_update": Tile(columns=32, warps=8),
}
MULTIPROCESSORS = 132  # of an H100 or H200
KV_SPLIT = 256  # keys of one program of paged decode: fixed, so that a row's sums do not depend on the batch
STATE_BLOCK = 4096  # numbers of a recurrent state that one program holds, at most
EXPERT_BLOCKS = (16, 32, 64)  # tokens of one program of the grouped product: few tokens, more, prompts
STEADY_ROWS = 512  # tokens of one launch of a deterministic product, which bounds its partial sums
STEADY_EXPERT_BLOCK = 32  # of EXPERT_BLOCKS, where it may not follow from the number of tokens
FEW_ROWS = 4  # up to so many tokens the multiply-add units keep up with the memory
SKINNY_ROWS = 64  # up to so many tokens our own products; beyond, cuBLAS
DEPENDENT_LAUNCHES = False  # in decode steps, until `deploy.benchmarks.gpu_once` has shown on a device that they pay


def tile(name: str) -> Tile:
    return TILES[name]
