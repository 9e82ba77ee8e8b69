"""The keys and values of one step's sequences, as fused operations attend to them."""

from dataclasses import dataclass

import torch

from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.model.fused_backend import FusedBackend


@dataclass(slots=True)
class Chunks:
    """The prefill chunks of a step; they come behind its decode rows."""

    table_rows: torch.Tensor  # (chunks,) int32
    starts: torch.Tensor  # (chunks + 1,) int32, from the first chunk's first token on
    lengths: torch.Tensor  # (chunks,) int32: context with the chunk itself
    most_queries: int
    covers_all: bool = True  # False: there may be tokens behind the last chunk


@dataclass(slots=True)
class StepContext:
    """Keys and values of one step, see model.batch.PagedContext."""

    backend: FusedBackend
    cache: KVCache
    page_table: torch.Tensor  # (slots + 1, pages) int32
    places: torch.Tensor  # (tokens,) int64
    table_rows: torch.Tensor  # (decode rows,) int32
    lengths: torch.Tensor  # (decode rows,) int32
    longest: int  # of them, or more
    chunks: Chunks | None = None

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.keys[layer], self.cache.values[layer]

    def attend(self, spec: AttentionSpec, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of all queries q (tokens, heads, dim) of the step, into out."""
        rows = len(self.lengths)
        if rows and self.backend.deterministic:  # in the one order of sums that chunks have
            starts = torch.arange(rows + 1, dtype=torch.int32, device=q.device)
            self.attend_chunks(spec, Chunks(self.table_rows, starts, self.lengths, 1), q[:rows], out[:rows])
        elif rows:
            self.attend_rows(spec, q[:rows], out[:rows])
        if self.chunks is not None:
            self.attend_chunks(spec, self.chunks, q[rows:], out[rows:])

    def attend_rows(self, spec: AttentionSpec, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of the decode rows: q (rows, heads, dim), into out."""
        sizes = self.backend.workspace.decode(len(q), spec.heads, spec.kv_heads, spec.head_dim, self.longest)
        self.backend.ops.paged_decode(
            q,
            *self.pools(spec.layer),
            self.page_table,
            self.table_rows,
            self.lengths,
            self.cache.page_size,
            self.longest,
            spec.scale,
            spec.window,
            spec.softcap,
            spec.sinks,
            self.backend.workspace.partials(sizes),
            self.backend.workspace.counters,
            out,
        )

    def attend_chunks(self, spec: AttentionSpec, chunks: Chunks, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attention of chunks: q (their tokens, heads, dim), into out."""
        if not chunks.covers_all:
            out.zero_()  # what is in no chunk has to be a number all the same
        self.backend.ops.paged_extend(
            q,
            *self.pools(spec.layer),
            self.page_table,
            chunks.table_rows,
            chunks.starts,
            chunks.lengths,
            self.cache.page_size,
            chunks.most_queries,
            spec.scale,
            spec.window,
            spec.softcap,
            spec.causal,
            spec.sinks,
            out,
        )
