"""Sampling on fused operations: the same draws as sampling/choose.py makes, without sorting a row."""

from dataclasses import dataclass

import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.triton.configs import tile
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.layers import Norm
from quartet.scheduler_service.model.products import Products
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows


@dataclass(slots=True)
class PlainDraws:
    """Inputs and outputs of draws that need only a temperature; fixed tensors, so the draw can be recorded."""

    temperatures: torch.Tensor  # (rows,) float32; 0: the largest logit
    seeds: torch.Tensor  # (rows,) int64
    positions: torch.Tensor  # (rows,) int64
    slots: torch.Tensor  # (rows,) int32
    logits: torch.Tensor  # out: (rows, vocab) float32, as they were drawn from: at 0 as the model gives them
    tokens: torch.Tensor  # out: (slots,) int64; tokens[slots[row]] is that of a row
    valid: torch.Tensor  # out: (rows,) int32


class FusedSampling:
    """Draws tokens from logits, or from the residual stream."""

    def __init__(self, products: Products) -> None:
        self.ops = products.ops
        self.workspace = products.workspace

    def draw(self, plain: PlainDraws) -> None:
        """A token for each row of plain.logits."""
        block = tile("logits").columns
        tops, masses = tiles_of(plain.logits, block)
        self.ops.process_logits(plain.logits, None, plain.temperatures, tops, masses)
        self.ops.draw(
            plain.logits,
            tops,
            masses,
            block,
            plain.temperatures,
            plain.seeds,
            plain.positions,
            plain.slots,
            plain.tokens,
            plain.valid,
        )

    def draw_with_head(
        self, residual: torch.Tensor, norm: Norm, lm_head: Linear, softcap: float | None, plain: PlainDraws
    ) -> None:
        """The same for a few rows of the residual stream (rows, hidden), whose logits are made on the way."""
        self.ops.lm_head_sample(
            residual,
            norm.weight,
            norm.epsilon,
            norm.plus_one,
            lm_head.weight,
            softcap,
            plain.temperatures,
            plain.seeds,
            plain.positions,
            plain.slots,
            plain.logits,
            *tiles_of(plain.logits, tile("lm_head").rows),
            self.workspace.counters,
            plain.tokens,
            plain.valid,
        )

    def sample(self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None) -> Draws:
        """See model.backend.Backend.sample; logits (rows, vocab) are kept as they were drawn from."""
        device = logits.device
        temperatures = upload(rows.temperatures, device, torch.float32)
        top_ks = upload(rows.top_ks, device, torch.int32)
        top_ps = upload(rows.top_ps, device, torch.float32)
        min_ps = upload(rows.min_ps, device, torch.float32)
        tops, masses = tiles_of(logits, tile("logits").columns)
        self.ops.process_logits(logits, allowed, temperatures, tops, masses)
        tokens = torch.empty(len(rows), dtype=torch.int64, device=device)
        valid = torch.empty(len(rows), dtype=torch.int32, device=device)
        self.ops.select(
            logits,
            tops,
            masses,
            temperatures,
            top_ks,
            top_ps,
            min_ps,
            upload(rows.seeds, device, torch.int64),
            upload(rows.positions, device, torch.int64),
            torch.empty(logits.shape, dtype=torch.int32, device=device),
            tokens,
            valid,
        )
        return Draws(tokens, valid.bool())


def tiles_of(logits: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Scratch memory for what the draw needs of every `block` logits: the largest, and the sum of the weights."""
    rows, vocab = logits.shape
    tiles = -(-vocab // block)
    # Two tensors, for kernels are compiled for the alignment of each.
    tops, masses = (torch.empty(rows, tiles, dtype=torch.float32, device=logits.device) for _ in range(2))
    return tops, masses
