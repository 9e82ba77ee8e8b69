"""The memory of recurrent states: two rows for each slot, so many snapshots, and one row of zeros.

row 0                    zeros: the state in front of the first token
1 + 2 * slot, and next   a running sequence reads one of these and writes the other, so that a step that has failed
                         can be computed again from the state it began with
behind them              snapshots, by number
"""

import logging
from collections.abc import Iterator, Sequence

import torch

from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.library import Library
from quartet.kernels.operations import Ops
from quartet.kernels.ops import resolve
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.process.memory import GB
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT, SnapshotOptions
from quartet.scheduler_service.execution.kv_cache import token_bytes, untouched_zeros
from quartet.scheduler_service.host.device import look_at_memory
from quartet.scheduler_service.host.pool_size import Need, Room, plan_states
from quartet.scheduler_service.model.batch import ServedModel, states_of
from quartet.scheduler_service.model.state_access import Run, StateAccess, StateRows, StateSpec

log = logging.getLogger(__name__)

ZEROS = 0
ROWS_PER_SLOT = 2
INTERVAL_TOKENS = 256  # between two snapshots of a long sequence
NOWHERE = -1  # the position of a row that holds no state
NO_DRAFTS = (
    "--speculative-algorithm is not for this model: its recurrent layers cannot take back the tokens of a wrong draft; "
    "leave it out"
)
LOST = "the recurrent state of the request at position {} is lost"


class StateCache:
    """The states of all recurrent layers, and which position each row of a slot stands at."""

    def __init__(
        self,
        specs: Sequence[StateSpec],
        slots: int,
        snapshots: int,
        device: torch.device,
        kernels: Library | None = None,
        ops: Ops | None = None,
    ) -> None:
        """`kernels` and `ops`: what recurrent layers compute with beside torch, see StateAccess."""
        self.specs = list(specs)
        self.slots, self.snapshots = slots, snapshots
        self.kernels, self.ops = kernels, ops
        self._device = device
        self.allocate()

    @property
    def rows(self) -> int:
        return row_count(self.slots, self.snapshots)

    @property
    def nbytes(self) -> int:
        return self.rows * sum(spec.nbytes for spec in self.specs)

    @property
    def gigabytes(self) -> float:
        return self.nbytes / GB

    def allocate(self) -> None:
        """Take the memory, all zeros."""
        self._positions = [[NOWHERE, NOWHERE] for _ in range(self.slots)]
        self.pools = {
            spec.layer: tuple(
                untouched_zeros((self.rows, *shape), dtype, self._device)
                for shape, dtype in zip(spec.shapes, spec.dtypes, strict=True)
            )
            for spec in self.specs
        }

    def release(self) -> None:
        """Give the memory back; nothing may compute until `allocate`."""
        self.pools = {}

    def places(self, plan: Plan, offsets: list[int]) -> StateRows:
        """Where a step's slices, whose tokens begin at `offsets`, read and write.

        A step computes each state once: after it, the rows of its slots stand at the ends of its slices. The same step
        may be asked for again.
        """
        reads: list[int] = []
        writes: list[int] = []
        runs: list[Run] = []
        copies: list[tuple[int, int]] = []
        for number, (part, first) in enumerate(zip(plan.slices, offsets, strict=False)):
            read, write = self._rows_of(part)
            if number < plan.decodes:
                reads.append(read)
                writes.append(write)
                copies += [(write, self._snapshot_row(snapshot)) for _, snapshot in part.saves]
                continue
            at = part.start
            for position, snapshot in part.saves:
                if position == part.end:
                    copies.append((write, self._snapshot_row(snapshot)))
                    break
                saved = self._snapshot_row(snapshot)
                runs.append(Run(first + at - part.start, first + position - part.start, read, saved))
                at, read = position, saved
            runs.append(Run(first + at - part.start, first + part.end - part.start, read, write))
        return StateRows(reads, writes, runs, copies)

    def access(self, rows: StateRows) -> StateAccess:
        """The states of a step as the layers take them; `copy` its `copies` behind it."""
        return StateAccess(
            self.pools, self._rows(rows.reads), self._rows(rows.writes), rows.runs, self.kernels, self.ops
        )

    def copy(self, rows: list[tuple[int, int]]) -> None:
        """Copy whole states, from and to these rows."""
        if not rows:
            return
        sources, targets = (self._rows(column) for column in zip(*rows, strict=True))
        for pools in self.pools.values():
            for pool in pools:
                pool[targets] = pool[sources]

    def _rows_of(self, part: Slice) -> tuple[int, int]:
        """The rows that a slice reads and writes. Raises RuntimeError where no row has the state it begins with."""
        slot = part.sequence.slot
        positions = self._positions[slot]
        own = 1 + ROWS_PER_SLOT * slot
        if part.restores != NO_SNAPSHOT or part.start == 0:
            positions[:] = [part.end, NOWHERE]
            return (self._snapshot_row(part.restores) if part.start else ZEROS), own
        if part.start not in positions:
            raise RuntimeError(LOST.format(part.start))
        read = positions.index(part.start)
        positions[1 - read] = part.end
        return own + read, own + 1 - read

    def snapshot(self, number: int) -> Iterator[torch.Tensor]:
        """The tensors of a snapshot, layer by layer; what is written to them is its state."""
        row = self._snapshot_row(number)
        for layer in sorted(self.pools):
            yield from (pool[row] for pool in self.pools[layer])

    def _rows(self, numbers: Sequence[int]) -> torch.Tensor:
        return torch.tensor(numbers, dtype=torch.int64, device=self._device)

    def _snapshot_row(self, number: int) -> int:
        return row_count(self.slots, number)


def implementations(config: ResolvedConfig, device: torch.device) -> tuple[Library | None, Ops | None]:
    """What recurrent layers compute with on this device, beside torch: see StateAccess."""
    if device.type == "cpu":
        return native.library(), None
    return None, resolve(device.type) if config.attention_backend != "torch_native" else None


def row_count(slots: int, snapshots: int) -> int:
    """Rows of each pool."""
    return 1 + ROWS_PER_SLOT * slots + snapshots


def snapshot_options(states: StateCache | None, page_size: int) -> SnapshotOptions | None:
    """What the prefix cache has for a model with recurrent layers; None for another model."""
    if states is None:
        return None
    return SnapshotOptions(states.snapshots, -(-INTERVAL_TOKENS // page_size) * page_size)


def make_state_cache(
    config: ResolvedConfig, model: ServedModel, device: torch.device, context_length: int, sharing: int = 1
) -> StateCache | None:
    """Size and allocate the states of a model whose weights are loaded; None without recurrent layers.

    `sharing`: how many ranks take as much of the same memory. Raises StartupError.
    """
    specs = states_of(model)
    if not specs:
        return None
    if config.speculation is not None:
        raise StartupError(NO_DRAFTS)
    bytes_per_state = sum(spec.nbytes for spec in specs)
    most_tokens = config.max_running_requests * context_length
    per_token = sharing * token_bytes(model.attention, model.dtype)
    need = Need(config.page_size, per_token, most_tokens, context_length)
    room = Room(look_at_memory(device), sharing * model.weights.served_bytes())
    plan = plan_states(config, need, room, sharing * bytes_per_state, ROWS_PER_SLOT)
    try:
        states = StateCache(specs, plan.slots, plan.snapshots, device, *implementations(config, device))
    except (OSError, MemoryError, torch.OutOfMemoryError) as error:
        raise StartupError(f"no room for the recurrent states of {plan.slots} requests: {error}") from error
    log.info(
        "Recurrent states are allocated: %d requests, %d snapshots for the prefix cache, %.2f GB (%d bytes a state).",
        plan.slots,
        plan.snapshots,
        states.gigabytes,
        bytes_per_state,
    )
    return states
