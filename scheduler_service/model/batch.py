"""What a model's forward pass sees: a ragged batch of tokens and a way to attend."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

from quartet.kernels.cpu.native.page_table import PageTable, Wanted
from quartet.scheduler_service.model.state_access import StateAccess, StateSpec
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows
from quartet.scheduler_service.weights.parameters import Weights


@dataclass(frozen=True, slots=True)
class AttentionSpec:
    """The static facts of one layer's attention."""

    layer: int
    heads: int
    kv_heads: int
    head_dim: int
    scale: float
    window: int | None = None  # a query at p sees keys in (p - window, p]; up to p + window where it is not causal
    chunk: int | None = None  # positions; a query sees keys in its own chunk alone
    softcap: float | None = None
    causal: bool = True
    sinks: torch.Tensor | None = None  # (heads,)
    values_are_keys: bool = False  # both are the same vectors, of which the pool keeps one copy


class Attend(Protocol):
    """Write k and v of the batch's tokens to the KV pool, then attend over each sequence's whole context."""

    def __call__(self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """q (tokens, heads, dim), k and v (tokens, kv_heads, dim) → (tokens, heads, dim)."""
        ...


class PagedAttend(Attend, Protocol):
    """An Attend that also lets a backend write keys and values by itself."""

    places: torch.Tensor  # (tokens,) int64: where in the pools the tokens' keys and values go
    wanted: Wanted | None  # tokens whose hidden states somebody looks at; a backend may leave out others'. None: all

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each (kv_heads, pool tokens, dim), ready to be written to at `places`."""
        ...

    def begin_pages(self) -> int:
        """Make all layers' pools ready to be written to; returns which they are, a number of addresses.moved()."""
        ...

    def attend_written(self, spec: AttentionSpec, q: torch.Tensor) -> torch.Tensor:
        """Attend once keys and values of the batch's tokens are written: q and result (tokens, heads, dim)."""
        ...

    def page_table(self) -> PageTable | None:
        """The pages of the batch's sequences, for a backend that attends by itself; None where it must not."""
        ...


class PagedContext(Protocol):
    """The keys and values of a step's sequences, as the fused decoder (fused.py) reads and writes them."""

    places: torch.Tensor  # (tokens,) int64: where in the pools the tokens' keys and values go

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of a layer, each (kv_heads, pool tokens, dim)."""
        ...

    def attend(self, spec: AttentionSpec, q: torch.Tensor, out: torch.Tensor) -> None:
        """Attend over each sequence's context, which the step's own keys are part of: q (tokens, heads, dim) → out."""
        ...


@dataclass(frozen=True, slots=True)
class ExpertShape:
    """The size of a model's mixture of experts; `layers` counts those without experts too."""

    layers: int
    experts: int
    top_k: int


@dataclass(slots=True)
class Batch:
    """One step's tokens, sequences side by side, no padding."""

    input_ids: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64
    attend: Attend | PagedContext  # the latter for the fused decoder
    starts: torch.Tensor  # (sequences + 1,) int64, offsets into tokens
    token_types: torch.Tensor | None = None  # (tokens,) int64
    attended: list[int] | None = None  # by sequence: its first tokens, which others see; for encoders. None: all
    tasks: list[str] | None = None  # by sequence: whose adapter it has, "": none; for encoders. None: all have none
    embeds: torch.Tensor | None = None  # (tokens, hidden) used where embeds_mask is set
    embeds_mask: torch.Tensor | None = None  # (tokens,) bool
    record_experts: Callable[[int, torch.Tensor], None] | None = None  # (layer, topk_ids (tokens, k))
    states: StateAccess | None = None  # of a model with recurrent layers


def states_of(model: "ServedModel") -> list[StateSpec]:
    """The states that recurrent layers keep; none where all layers attend."""
    states: list[StateSpec] = getattr(model, "states", [])
    return states


class ServedModel(Protocol):
    """A causal language model as the worker uses it (scheduler_service/model/registry.py builds them)."""

    attention: list[AttentionSpec]  # one per layer that keeps KV; defines the KV pool
    dtype: torch.dtype  # of activations and KV
    hidden_size: int
    vocab_size: int
    weights: Weights  # all parameters, by their names in the checkpoint

    def forward(self, batch: Batch) -> torch.Tensor:
        """Hidden states after the final norm: (tokens, hidden), or those of the tokens that `batch.attend` wants."""
        ...

    def logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab_size), soft-capped and scaled as the architecture says.

        Into `out` if there is one.
        """
        ...

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        """One token per row of logits (rows, vocab): see model.backend.Backend.sample."""
        ...
