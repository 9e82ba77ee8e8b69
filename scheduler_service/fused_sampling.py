"""Sampling on fused operations: the same draws as scheduler_service/sampler.py makes, without sorting a row."""

from dataclasses import dataclass

import torch

from kernels.configs import SKINNY_ROWS, tile
from scheduler_service.model.decoder import Decoder
from scheduler_service.model.fused_backend import FusedBackend
from scheduler_service.sampler import Draws, Row, Wish, adjust_single_tokens
from scheduler_service.transfer import upload


def is_plain(row: Row) -> bool:
    """Whether a row wants nothing but a temperature, or the largest logit."""
    return not row.wish & ~Wish.DRAW


def temperature(row: Row) -> float:
    """0 stands for the largest logit."""
    return row.params.temperature if row.wish & Wish.DRAW else 0.0


@dataclass(slots=True)
class FusedSampler:
    """Draws tokens from what a model computes on a FusedBackend."""

    model: Decoder
    backend: FusedBackend

    def draw_plain(
        self,
        residual: torch.Tensor,
        temperatures: torch.Tensor,
        seeds: torch.Tensor,
        positions: torch.Tensor,
        slots: torch.Tensor,
        logits: torch.Tensor,
        tokens: torch.Tensor,
        valid: torch.Tensor,
    ) -> None:
        """A token for each row of the residual stream (rows, hidden), into tokens[slots[row]]; can be recorded.

        `logits` (rows, vocab) are left as they were drawn from: with temperatures of 0 as the model gives them.
        """
        model, ops = self.model, self.backend.ops
        if len(residual) > SKINNY_ROWS or self.backend.deterministic:
            model.logits(model.normed(residual), out=logits)
            tops, masses = self.facts(logits, tile("logits").columns)
            ops.process_logits(logits, None, temperatures, tops, masses)
            block = tile("logits").columns
            ops.draw(logits, tops, masses, block, temperatures, seeds, positions, slots, tokens, valid)
            return
        norm, lm_head = model.norm, model.lm_head
        assert lm_head is not None
        ops.lm_head_sample(
            residual,
            norm.weight,
            norm.epsilon,
            norm.plus_one,
            lm_head.weight,
            model.spec.logit_softcap,
            temperatures,
            seeds,
            positions,
            slots,
            logits,
            *self.facts(logits, tile("lm_head").rows),
            self.backend.workspace.counters,
            tokens,
            valid,
        )

    def facts(self, logits: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Room for what the draw wants to know of every `block` logits."""
        rows, vocab = logits.shape
        tiles = -(-vocab // block)
        # Two tensors, for kernels are compiled for the alignment of each.
        tops, masses = (torch.empty(rows, tiles, dtype=torch.float32, device=logits.device) for _ in range(2))
        return tops, masses

    def sample(
        self,
        logits: torch.Tensor,
        rows: list[Row],
        positions: list[int],
        allowed: torch.Tensor | None = None,
        keep_logits: bool = False,
    ) -> Draws:
        """One token per row of logits (rows, vocab), which are adjusted in place and kept; see sampler.sample."""
        adjust_single_tokens(logits, rows, positions)
        device = logits.device
        columns = zip(*map(filters, rows), strict=True)
        kinds = torch.float32, torch.int32, torch.float32, torch.float32
        temperatures, top_ks, top_ps, min_ps = (
            upload(column, device, kind) for column, kind in zip(columns, kinds, strict=True)
        )
        tops, masses = self.facts(logits, tile("logits").columns)
        ops = self.backend.ops
        ops.process_logits(logits, allowed, temperatures, tops, masses)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        valid = torch.empty(len(rows), dtype=torch.int32, device=device)
        ops.select(
            logits,
            tops,
            masses,
            temperatures,
            top_ks,
            top_ps,
            min_ps,
            upload([row.seed for row in rows], device, torch.int64),
            upload(positions, device, torch.int64),
            None,
            torch.empty(logits.shape, dtype=torch.int32, device=device),
            tokens,
            valid,
        )
        return Draws(tokens, valid.bool())


def filters(row: Row) -> tuple[float, int, float, float]:
    """Temperature (0 for the largest), top-k, top-p and min-p; neutral where off."""
    params, wish = row.params, row.wish
    return (
        temperature(row),
        params.top_k if wish & Wish.TOP_K else 0,
        params.top_p if wish & Wish.TOP_P else 1.0,
        params.min_p if wish & Wish.MIN_P else 0.0,
    )
