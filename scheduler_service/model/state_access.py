"""Where recurrent layers find what they know of earlier tokens: a state of fixed size for each sequence.

A step says for each of its sequences where that state is read and written (`StateAccess`): decode rows are computed
together, the runs of prompts one after another, since a run may begin with the state that the one before has left.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.native.library import Library
from quartet.kernels.operations import Ops


@dataclass(frozen=True, slots=True)
class StateSpec:
    """What a layer keeps of a sequence: tensors of these shapes and types."""

    layer: int
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]

    @property
    def nbytes(self) -> int:
        """Of one state."""
        pairs = zip(self.shapes, self.dtypes, strict=True)
        return sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in pairs)


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens [first, last) of one sequence; the state in front of them, and where the one behind them goes."""

    first: int
    last: int
    read: int  # row of the state pools
    write: int


@dataclass(frozen=True, slots=True)
class StateRows:
    """Which rows of the state pools a step reads and writes, and which it copies behind it: the same on every rank."""

    reads: list[int]  # by decode row
    writes: list[int]  # likewise
    runs: list[Run]  # in the order in which they have to be computed
    copies: list[tuple[int, int]]  # from and to


@dataclass(slots=True)
class StateAccess:
    """Where the states of a step's sequences are. The first tokens of the step are decode rows, then come the runs."""

    pools: dict[int, tuple[torch.Tensor, ...]]  # by layer, each (rows, *shape)
    reads: torch.Tensor  # (decode rows,) int64
    writes: torch.Tensor  # (decode rows,) int64
    runs: list[Run]  # in the order in which they have to be computed
    kernels: Library | None = None  # for all tokens on a CPU; without them torch computes
    ops: Ops | None = None  # for decode rows on another device
    _table: torch.Tensor | None = None

    @property
    def table(self) -> torch.Tensor:
        """All of the step as the kernels take it, decode rows first: first and last token, rows to read and to write.

        (decode rows + runs, 4) int64
        """
        if self._table is None:
            first = torch.arange(len(self.reads))
            decodes = torch.stack((first, first + 1, self.reads, self.writes), dim=1)
            runs = [(run.first, run.last, run.read, run.write) for run in self.runs]
            self._table = torch.cat((decodes, torch.tensor(runs, dtype=torch.int64).view(-1, 4)))
            rows = {len(pool) for pools in self.pools.values() for pool in pools}
            assert (self._table >= 0).all() and int(self._table[:, 2:].max()) < min(rows), (self._table, rows)
            assert (self._table[:, 0] < self._table[:, 1]).all(), self._table
        return self._table

    def scan(
        self,
        layer: int,
        compute: Callable[..., tuple[torch.Tensor, ...]],
        x: torch.Tensor,
        update: Callable[..., torch.Tensor],
    ) -> torch.Tensor:
        """Take all tokens x (tokens, width) through their states: (tokens, width of the result).

        `compute` maps x (sequences, tokens, width) and states (sequences, *shape) to y and the new states. `update`
        does the same for decode rows by `ops`: it maps these, x (rows, width), reads, writes and the pools to y.
        """
        pools, decodes = self.pools[layer], len(self.reads)
        parts: list[torch.Tensor] = []
        if decodes and self.ops is not None:
            parts.append(update(self.ops, x[:decodes], self.reads, self.writes, *pools))
        elif decodes:
            y, *states = compute(x[:decodes].unsqueeze(1), *(pool[self.reads] for pool in pools))
            for pool, state in zip(pools, states, strict=True):
                pool[self.writes] = state
            parts.append(y.squeeze(1))
        for run in self.runs:
            read = slice(run.read, run.read + 1)
            y, *states = compute(x[run.first : run.last].unsqueeze(0), *(pool[read] for pool in pools))
            for pool, state in zip(pools, states, strict=True):
                pool[run.write] = state[0]
            parts.append(y.squeeze(0))
        return torch.cat(parts) if len(parts) > 1 else parts[0]
