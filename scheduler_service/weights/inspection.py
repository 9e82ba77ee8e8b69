"""Inspects the weights that serve: hashes, a snapshot to compare with, the first rows of a tensor."""

from collections.abc import Collection
from typing import Any

import torch
import xxhash

from quartet.runtime import limits
from quartet.runtime.errors import CommandRefused
from quartet.runtime.shorten import short
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights.parameters import Weights, checksum_of

ROWS_PER_PIECE = 64


class Inspection:
    """Reads weights; changes nothing. A snapshot stays in memory until the next one."""

    def __init__(self, weights: Weights) -> None:
        self._weights = weights
        self._snapshot: dict[str, torch.Tensor] | None = None

    def names(self, skipped: Collection[str] | None) -> list[str]:
        """The model's tensors, sorted, without the skipped ones."""
        left_out = frozenset(skipped or ())
        return sorted(name for name in self._weights.names() if name not in left_out)

    def whole(self, name: str) -> torch.Tensor:
        """A tensor as a checkpoint has it."""
        return self._weights.view(name)

    def checksums(self, names: list[str]) -> tuple[dict[str, str], str]:
        """xxh3 of each tensor's bytes in the served dtype, and one digest of them all."""
        checksums = {name: checksum_of(self.whole(name)) for name in names}
        return checksums, digest_of(checksums)

    def take_snapshot(self, names: list[str]) -> None:
        self._snapshot = {name: self._weights.view(name).to("cpu", copy=True) for name in names}

    def differing(self, names: list[str]) -> list[str] | None:
        """The tensors that are not, bit for bit, as in the snapshot; None without one."""
        if self._snapshot is None:
            return None
        return [name for name in names if not self._unchanged(name, self._snapshot.get(name))]

    def _unchanged(self, name: str, kept: torch.Tensor | None) -> bool:
        now = self._weights.view(name).cpu()
        return kept is not None and torch.equal(as_bytes(now), as_bytes(kept))

    def rows(self, name: str, count: int) -> list[Any] | None:
        """The first `count` rows (or values of a vector) as floats; None for an unknown name. Raises CommandRefused."""
        if name not in self._weights.layout.places:
            return None
        values = self.whole(name)
        own_rows = values[:count] if values.dim() else values.view(1)
        if own_rows.numel() > limits.MAX_SHOWN_WEIGHTS:
            per_row = own_rows.numel() // len(own_rows)
            most = limits.MAX_SHOWN_WEIGHTS // per_row
            raise CommandRefused(
                f"truncate_size {short(count)} is too large: at most {most} rows of {per_row} are shown."
            )
        rows: list[Any] = []
        for start in range(0, len(own_rows), ROWS_PER_PIECE):
            yield_point()
            rows += own_rows[start : start + ROWS_PER_PIECE].float().cpu().tolist()
        return rows


def as_bytes(values: torch.Tensor) -> torch.Tensor:
    """For comparisons: NaN is not equal to itself, but its bytes are."""
    return values.contiguous().view(torch.uint8)


def digest_of(checksums: dict[str, str]) -> str:
    """One hash of all; equal wherever the same tensors have the same bytes."""
    lines = "".join(f"{name} {checksum}\n" for name, checksum in sorted(checksums.items()))
    return xxhash.xxh3_64_hexdigest(lines.encode())
