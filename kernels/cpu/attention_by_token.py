"""Paged attention whose bits for a query depend only on that query's context, on the CPU.

`paged_attention` is fast because queries share calls: how sums are split then depends on who else is in the step, on
where a prompt was cut into chunks and on how a sequence's pages lie. Here each query attends by itself, over keys that
lie side by side: the same shapes, whatever the step.
"""

import torch

from quartet.kernels.cpu.attention import Attend
from quartet.kernels.cpu.attention_schedule import Ragged, Run, page_list, segments


def paged_attention_by_token(
    ragged: Ragged,
    q: torch.Tensor,
    k_pool: torch.Tensor,
    v_pool: torch.Tensor,
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    causal: bool = True,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q (tokens, heads, dim) against pools (kv_heads, pool tokens, dim) → (tokens, heads, dim). Causal only."""
    assert causal, "without a direction a query's context is not its own"
    kv_heads, _, dim = k_pool.shape
    grouped = q.view(len(q), kv_heads, -1, dim)  # (tokens, kv_heads, group, dim)
    out = torch.empty_like(grouped)
    attend = Attend(k_pool, v_pool, scale, softcap, ragged.page_size, [])
    row = 0
    for queries, length, runs in zip(ragged.query_lengths, ragged.context_lengths, ragged.runs, strict=True):
        k, v = context(attend, runs, length)
        for last in range(length - queries + 1, length + 1):
            first = 0 if window is None else max(0, last - window)
            keys, values = k[:, first:last].unsqueeze(0), v[:, first:last].unsqueeze(0)
            result, lse = attend(grouped[row].unsqueeze(0), keys, values, None)  # (1, kv_heads, group, dim)
            if sinks is not None:
                kept = torch.sigmoid(lse - sinks.float().view(1, kv_heads, -1))
                result = result * kept.unsqueeze(-1).to(result.dtype)
            out[row] = result[0]
            row += 1
    return out.view(q.shape)


def context(attend: Attend, runs: list[Run], length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values (kv_heads, length or more, dim) of one sequence, side by side."""
    found = segments(runs, attend.page_size, 0, length)
    if len(found) == 1:
        return attend.keys(found[0], None)
    return attend.keys(None, torch.tensor(page_list(runs, 0, -(-length // attend.page_size))))
