"""Steps with prompts on buffers that stay in place, so that they too can be recorded.

The buffers hold decode rows first and the tokens of all chunks behind them, both up to the recorded size. Rows beyond
the step's own have the null slot; tokens beyond belong to no chunk, and their keys go to the null page. What comes
out is what an unrecorded step gives: hidden states, from which the worker goes on as ever.

A small model is what this is for: its prompts are computed faster than some hundred operations can be launched.
"""

from collections.abc import Sequence

import torch

from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.adapter_tiles import TileBuffer, runs_of
from quartet.scheduler_service.execution.device_state import PageTable
from quartet.scheduler_service.execution.graphs import Graphs, Key, Recorder
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.step_context import Chunks, StepContext
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.batch import Batch
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.fused_backend import FusedBackend

CHUNKS = 16  # at most, in a recorded step
ROWS = (0, 8, 32, 128)  # decode rows in the same step
LEAST_TOKENS = 16  # smallest size; each further one is twice as long


def token_sizes(largest: int) -> list[int]:
    """QuantizedRows of prompt tokens that are recorded, up to `largest`."""
    sizes = []
    tokens = LEAST_TOKENS
    while tokens < largest:
        sizes.append(tokens)
        tokens *= 2
    return [*sizes, largest]


def row_sizes(slots: int) -> list[int]:
    """QuantizedRows of decode rows in the same step, of which there are at most `slots`."""
    most = min(slots, ROWS[-1])
    return [*(size for size in ROWS if size < most), most]


class FusedPrefill:
    """Runs plans with up to `largest` prompt tokens on fixed buffers, recorded as `recorder` does."""

    def __init__(
        self,
        model: Decoder,
        backend: FusedBackend,
        cache: KVCache,
        page_table: PageTable,
        recorder: Recorder,
        lengths: list[int],
        largest: int,
    ) -> None:
        """`lengths`: context lengths to record for the decode rows, ascending."""
        self.model = model  # on this backend
        self.backend = backend
        self.cache = cache
        self.page_table = page_table
        device, self.null_slot = model.device, len(page_table.values) - 1
        tokens, rows = token_sizes(largest), row_sizes(self.null_slot)
        room = rows[-1] + largest
        self.input_ids, self.positions, self.places = torch.zeros(3, room, dtype=torch.int64, device=device)
        self.numbers = torch.zeros(2 * rows[-1] + 3 * CHUNKS + 1, dtype=torch.int32, device=device)
        self.hidden = torch.zeros(room, model.hidden_size, dtype=model.dtype, device=device)
        self.tiles = None if backend.adapters is None else TileBuffer(room, backend.adapters.pool.slots, device)
        self.graphs = Graphs(self.compute, self.clear, recorder, rows, lengths, tokens)
        self.graphs.waiting.extend(Key(0, lengths[0], size) for size in reversed(tokens))
        self.clear()

    def covers(self, plan: Plan, inputs: Inputs) -> bool:
        """Whether a plan can run on the buffers."""
        prompts = len(plan.slices) - plan.decodes
        tokens = inputs.offsets[-1] - plan.decodes
        return 0 < prompts <= CHUNKS and inputs.embeds is None and self.graphs.covers(plan.decodes, tokens)

    def forward(
        self, plan: Plan, inputs: Inputs, owners: Sequence[int] = (), ranks: Sequence[int] = ()
    ) -> torch.Tensor:
        """Hidden states of the step's tokens (tokens, hidden), which the next step overwrites.

        The pages of the plan's sequences are in the page table already. `owners` are the slots of the slices' LoRA
        adapters (-1: none), empty where all have none; `ranks` are those of the slots.
        """
        rows, tokens = plan.decodes, inputs.offsets[-1] - plan.decodes
        longest = max((share.end for share in plan.slices[:rows]), default=0)
        key = self.graphs.key(rows, longest, tokens, adapters=bool(owners))
        self.graphs.prepare(key)
        self.places.zero_()
        filled = (
            (self.input_ids, inputs.input_ids),
            (self.positions, inputs.positions),
            (self.places, inputs.placement.slots),
        )
        for buffer, values in filled:
            buffer[:rows].copy_(values[:rows])
            buffer[key.rows : key.rows + tokens].copy_(values[rows:])
        self.numbers.copy_(upload(self.numbers_of(plan, inputs.offsets, key.rows), self.model.device, torch.int32))
        if self.tiles is not None and owners:
            self.tiles.send(key.rows + key.tokens, runs_of(owners, inputs.offsets, rows, key.rows - rows), ranks)
        self.graphs.run(key)
        if rows == key.rows:
            return self.hidden[: rows + tokens]
        return torch.cat((self.hidden[:rows], self.hidden[key.rows : key.rows + tokens]))

    def numbers_of(self, plan: Plan, offsets: list[int], rows: int) -> list[int]:
        """What attention asks for, as `context` reads it: `rows` decode rows, then CHUNKS chunks."""
        slots = [share.sequence.slot for share in plan.slices]
        ends = [share.end for share in plan.slices]
        own, prompts = plan.decodes, len(plan.slices) - plan.decodes
        starts = [offset - own for offset in offsets[own:]]
        numbers = [
            *padded(slots[:own], rows, self.null_slot),
            *padded(ends[:own], rows, 0),
            *padded(slots[own:], CHUNKS, self.null_slot),
            *padded(ends[own:], CHUNKS, 0),
            *padded(starts, CHUNKS + 1, starts[-1]),
        ]
        assert prompts <= CHUNKS, prompts
        return padded(numbers, len(self.numbers), 0)

    def context(self, key: Key) -> StepContext:
        """How a step of this size attends; the chunks may be any that fit."""
        sizes = [key.rows, key.rows, CHUNKS, CHUNKS, CHUNKS + 1]
        slots, lengths, chunk_slots, chunk_lengths, starts = torch.split(self.numbers[: sum(sizes)], sizes)
        return StepContext(
            backend=self.backend,
            cache=self.cache,
            page_table=self.page_table.values,
            places=self.places[: key.rows + key.tokens],
            table_rows=slots,
            lengths=lengths,
            longest=key.longest,
            chunks=Chunks(chunk_slots, starts, chunk_lengths, key.tokens, covers_all=False),
        )

    def compute(self, key: Key) -> None:
        """One step of this size on the buffers. Nothing in it depends on the host, so it can be recorded."""
        size = key.rows + key.tokens
        context = self.context(key)
        batch = Batch(self.input_ids[:size], self.positions[:size], context, starts=context.lengths)
        with self.backend.adapting(self.tiles.of(size) if self.tiles is not None and key.adapters else None):
            self.hidden[:size].copy_(self.model.forward(batch))

    def clear(self) -> None:
        """No chunks, and rows without a context, whatever the size."""
        for buffer in (self.input_ids, self.positions, self.places, self.numbers):
            buffer.zero_()
        if self.tiles is not None:
            self.tiles.clear()


def padded(numbers: list[int], length: int, filling: int) -> list[int]:
    return numbers + [filling] * (length - len(numbers))
