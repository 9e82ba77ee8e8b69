"""Steps on fused operations; decode steps on buffers that stay in place, so that they can be replayed as graphs.

A decode step reads its tokens, positions and pages on the device. The step before it wrote the tokens there and
increased the positions. The host sends only what is new: the slots when the batch has changed, added pages, the
position of a request whose prompt has just been computed.
"""

import logging
from collections.abc import Sequence as QuantizedRows
from operator import is_
from typing import Protocol

import torch

from quartet.kernels.ops import Implementation
from quartet.kernels.triton.configs import DEPENDENT_LAUNCHES
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.execution.adapter_tiles import TileBuffer, runs_of, uploaded
from quartet.scheduler_service.execution.device_adapters import adapter_pool
from quartet.scheduler_service.execution.device_state import PageTable, SlotPositions, SlotTokens
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.fused_prefill import FusedPrefill
from quartet.scheduler_service.execution.graphs import (
    CudaRecorder,
    Graphs,
    Key,
    PlainRecorder,
    Recorder,
    length_sizes,
    row_sizes,
)
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.step_context import Chunks, StepContext
from quartet.scheduler_service.execution.steps import Computed, Step, Steps
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.adapter_pool import AdapterPool
from quartet.scheduler_service.model.batch import Batch, ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.fused_backend import FusedBackend, can_fuse
from quartet.scheduler_service.model.fused_sampling import PlainDraws
from quartet.scheduler_service.sampling.rows import Draws, DrawSettings

log = logging.getLogger(__name__)

NOT_FUSED = "--enable-deterministic-inference needs the fused operations on a GPU, and {} does not run on them"


class Buffers:
    """What decode steps of any size read and write; never moved."""

    def __init__(self, rows: int, vocab_size: int, device: torch.device) -> None:
        self.slots = torch.zeros(rows, dtype=torch.int32, device=device)
        self.logits = torch.zeros(rows, vocab_size, dtype=torch.float32, device=device)
        self.temperatures = torch.zeros(rows, dtype=torch.float32, device=device)
        self.seeds = torch.zeros(rows, dtype=torch.int64, device=device)
        self.tokens = torch.zeros(rows, dtype=torch.int64, device=device)
        self.valid = torch.zeros(rows, dtype=torch.int32, device=device)
        self.running: list[int] = []  # what `slots` begins with
        self.drawing: list[DrawSettings] = []  # whose temperatures and seeds are in the buffers


class PlacedAdapters(Protocol):
    """The LoRA adapters of steps, see device_adapters.DeviceAdapters."""

    @property
    def ranks(self) -> QuantizedRows[int]:
        """By slot."""
        ...

    def slots_of(self, plan: Plan) -> list[int]:
        """The slot of each slice's adapter, -1: none. Empty where all have none."""
        ...


class FusedSteps(Steps):
    """Runs plans on a FusedBackend: decode steps on fixed buffers, all other steps operation by operation."""

    reads_slots = True
    model: Decoder

    def __init__(
        self, model: Decoder, backend: FusedBackend, cache: KVCache, tokens: SlotTokens, context_length: int
    ) -> None:
        """`model` is on the backend already."""
        super().__init__(model, cache, tokens)
        self.backend = backend
        slots = tokens.null_slot
        pages = -(-context_length // cache.page_size) + 1
        self.page_table = PageTable(slots, pages, model.device)
        self.positions = SlotPositions(slots, model.device)
        self.buffers: Buffers | None = None
        self.graphs: Graphs | None = None
        self.prefill: FusedPrefill | None = None
        self.adapters: PlacedAdapters | None = None  # None: no request names any
        self.tiles: TileBuffer | None = None  # of decode steps
        self.context_length = context_length
        self.reserve(max(slots, 1))

    def use_graphs(self, recorder: Recorder, largest: int, prompt_tokens: int = 0) -> None:
        """Run decode steps of up to `largest` rows on fixed buffers, recorded as `recorder` does.

        The same for steps with up to `prompt_tokens` of prompts.
        """
        self.reserve(largest)
        self.buffers = Buffers(largest, self.model.vocab_size, self.model.device)
        adapters = self.backend.adapters
        self.tiles = None if adapters is None else TileBuffer(largest, adapters.pool.slots, self.model.device)
        self.clear()
        rows, lengths = row_sizes(largest), length_sizes(self.context_length)
        self.graphs = Graphs(self.compute, self.clear, recorder, rows, lengths, adapters=adapters is not None)
        if prompt_tokens:
            self.prefill = FusedPrefill(
                self.model, self.backend, self.cache, self.page_table, recorder, lengths, prompt_tokens
            )

    def reserve(self, rows: int) -> None:
        """Allocate counters for decode steps of so many rows."""
        self.backend.workspace.reserve(rows * self.model.spec.kv_heads)

    # any step

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        """See Steps.forward."""
        self.page_table.update([share.sequence for share in plan.slices])
        owners, ranks = self.adapters_of(plan)
        if self.prefill is not None and record_experts is None and self.prefill.covers(plan, inputs):
            return self.prefill.forward(plan, inputs, owners, ranks)
        batch = Batch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            attend=self.context(plan, inputs),
            starts=inputs.starts,
            embeds=inputs.embeds,
            embeds_mask=inputs.embeds_mask,
            record_experts=record_experts,
        )
        tiles = None
        if owners:
            tiles = uploaded(inputs.offsets[-1], runs_of(owners, inputs.offsets), ranks, self.model.device)
        with self.backend.adapting(tiles):
            return self.model.forward(batch)

    def adapters_of(self, plan: Plan) -> tuple[list[int], QuantizedRows[int]]:
        """The slots of the slices' adapters, empty where all have none, and the ranks of the slots."""
        owners = [] if self.adapters is None else self.adapters.slots_of(plan)
        return (owners, self.adapters.ranks) if owners and self.adapters is not None else ([], ())

    def context(self, plan: Plan, inputs: Inputs) -> StepContext:
        """Where a step's rows and chunks find their keys and values."""
        device, rows = self.model.device, plan.decodes
        slots = upload([share.sequence.slot for share in plan.slices], device, torch.int32)
        ends = [share.end for share in plan.slices]
        lengths = upload(ends, device, torch.int32)
        chunks = None
        if prefills := plan.slices[rows:]:
            starts = upload([offset - rows for offset in inputs.offsets[rows:]], device, torch.int32)
            most_queries = max(share.end - share.start for share in prefills)
            chunks = Chunks(slots[rows:], starts, lengths[rows:], most_queries)
        return StepContext(
            backend=self.backend,
            cache=self.cache,
            page_table=self.page_table.values,
            places=inputs.placement.slots,
            table_rows=slots[:rows],
            lengths=lengths[:rows],
            longest=max(ends[:rows], default=0),
            chunks=chunks,
        )

    # decode steps

    def decodes(self, plan: Plan) -> bool:
        """Whether a plan can run on the fixed buffers: one token of every sequence, no hidden states."""
        return (
            self.graphs is not None
            and plan.decodes == len(plan.slices)
            and self.graphs.covers(plan.decodes)
            and not any(share.sequence.request.return_hidden_states for share in plan.slices)
        )

    def decode(self, step: Step) -> Computed | None:
        if step.experts is not None or not self.decodes(step.plan):
            return None
        settings = [state.row.settings for state in step.states]
        drawn = all(one.plain for one in settings) and not any(state.matcher for state in step.states)
        return self.replay(step.plan, settings if drawn else None)

    def replay(self, plan: Plan, settings: list[DrawSettings] | None) -> Computed:
        """Launch a decode step. Its tokens are drawn with it by `settings`, all of them plain; None: they are not."""
        assert self.graphs is not None and self.buffers is not None
        rows, slots = len(plan.slices), [share.sequence.slot for share in plan.slices]
        owners, ranks = self.adapters_of(plan)
        key = self.graphs.key(rows, max(share.end for share in plan.slices), adapters=bool(owners))
        self.graphs.prepare(key)
        self.page_table.update([share.sequence for share in plan.slices])
        moved = self.positions.advance(slots, [share.start for share in plan.slices])
        self.send_tokens([plan.slices[i] for i in moved])
        self.send_slots(slots + [self.tokens.null_slot] * (key.rows - rows))
        self.send_settings(settings or [])
        if self.tiles is not None and owners:
            self.tiles.send(key.rows, runs_of(owners, range(rows + 1)), ranks)
        self.graphs.run(key)
        logits, tokens = self.buffers.logits[:rows], self.buffers.tokens[:rows]
        if settings is None:
            return Computed(logits=logits)
        if self.model.device.type == "cpu":  # where nothing is copied on its way to the host
            tokens = tokens.clone()
        return Computed(logits=logits, draws=Draws(tokens, self.buffers.valid[:rows] != 0))

    def send_tokens(self, shares: list[Slice]) -> None:
        """Upload the tokens that the host has: a step that failed may have left others in the slots."""
        known = [share for share in shares if share.start < len(share.sequence.ids)]
        if known:
            tokens = [share.sequence.ids[share.start] for share in known]
            self.tokens.write([share.sequence.slot for share in known], upload(tokens, self.model.device))

    def send_settings(self, rows: list[DrawSettings]) -> None:
        """Upload temperatures and seeds, unless those of the step before are the same. No rows: temperatures of 0."""
        assert self.buffers is not None
        buffers, device = self.buffers, self.model.device
        if len(rows) == len(buffers.drawing) and all(map(is_, rows, buffers.drawing)):
            return
        buffers.drawing = rows
        buffers.temperatures.zero_()
        if rows:
            buffers.temperatures[: len(rows)].copy_(upload([row.temperature for row in rows], device, torch.float32))
            buffers.seeds[: len(rows)].copy_(upload([row.seed for row in rows], device, torch.int64))

    def send_slots(self, slots: list[int]) -> None:
        """Upload the slots of a step's rows, unless those of the step before are the same."""
        assert self.buffers is not None
        if self.buffers.running[: len(slots)] != slots:
            self.buffers.slots[: len(slots)].copy_(upload(slots, self.model.device, torch.int32))
            self.buffers.running = slots

    def forget(self) -> None:
        self.positions.forget()
        self.page_table.forget()

    def clear(self) -> None:
        """Point every row at the null slot."""
        assert self.buffers is not None
        self.buffers.slots.fill_(self.tokens.null_slot)
        self.buffers.running = []
        if self.tiles is not None:
            self.tiles.clear()

    def compute(self, key: Key) -> None:
        """One decode step of this size on the buffers. Nothing in it depends on the host, so it can be recorded."""
        assert self.buffers is not None
        rows = key.rows
        model, backend, buffers, device = self.model, self.backend, self.buffers, self.model.device
        slots = buffers.slots[:rows]
        input_ids, positions, places = (torch.empty(rows, dtype=torch.int64, device=device) for _ in range(3))
        lengths = torch.empty(rows, dtype=torch.int32, device=device)
        residual = torch.empty(rows, model.hidden_size, dtype=model.dtype, device=device)
        cos, sin = (residual.new_empty(rows, 1, backend.tables[0].shape[2]) for _ in range(2))
        backend.ops.prepare(
            slots,
            self.tokens.values,
            self.positions.values,
            self.positions.finished,
            self.page_table.values,
            self.cache.page_size,
            model.embedding,
            model.embedding_scale,
            backend.tables[0],
            input_ids,
            positions,
            places,
            lengths,
            residual,
            cos,
            sin,
        )
        others = (backend.rotation(rope, positions) for rope in range(1, len(backend.tables)))
        context = StepContext(backend, self.cache, self.page_table.values, places, slots, lengths, key.longest)
        with backend.adapting(self.tiles.of(rows) if self.tiles is not None and key.adapters else None):
            model.run_layers(residual, [(cos, sin), *others], Batch(input_ids, positions, context, starts=slots))
        plain = PlainDraws(
            temperatures=buffers.temperatures[:rows],
            seeds=buffers.seeds[:rows],
            positions=lengths.long(),
            slots=slots,
            logits=buffers.logits[:rows],
            tokens=self.tokens.values,
            valid=buffers.valid[:rows],
        )
        assert model.norm is not None and model.lm_head is not None
        backend.draw(residual, model.norm, model.lm_head, model.spec.logit_scale, model.spec.logit_softcap, plain)
        torch.index_select(self.tokens.values, 0, slots, out=buffers.tokens[:rows])

    @property
    def uses_graphs(self) -> bool:
        return self.device.type == "cuda" and self.graphs is not None

    @property
    def graph_gigabytes(self) -> float:
        return self.graphs.gigabytes if self.graphs is not None else 0.0

    def idle_work(self) -> bool:
        if self.graphs is not None and self.graphs.idle_work():
            return True
        return self.prefill is not None and self.prefill.graphs.idle_work()

    def begin(self) -> None:
        """Record the graphs that the first steps need."""
        if self.graphs is not None:
            self.graphs.begin(self.model.device)

    def forget_graphs(self) -> None:
        if self.graphs is not None:
            self.graphs.forget()
        if self.prefill is not None:
            self.prefill.graphs.forget()


def make_fused_steps(
    config: ResolvedConfig,
    model: Decoder,
    cache: KVCache,
    tokens: SlotTokens,
    context_length: int,
    implementation: Implementation,
    dependent: bool | None = None,
    pool: AdapterPool | None = None,
) -> FusedSteps:
    """Fused steps of a model, ready to record graphs as the flags say; `implementation` as in kernels/ops.py.

    `pool`: of its LoRA adapters; without one, a server that takes adapters gets one here.
    """
    if dependent is None:
        dependent = implementation == "triton" and DEPENDENT_LAUNCHES
    spec, steady = model.spec, config.enable_deterministic_inference
    options = implementation, context_length, dependent, steady, pool or adapter_pool(config, model)
    backend = FusedBackend(spec.ropes, model.dtype, model.device, *options)
    steps = FusedSteps(model.on(backend), backend, cache, tokens, context_length)
    if config.max_graph_rows:
        recorder = CudaRecorder() if model.device.type == "cuda" else PlainRecorder()
        largest = min(config.max_graph_rows, tokens.null_slot)
        steps.use_graphs(recorder, largest, config.cuda_graph_max_prefill_tokens)
    return steps


def fused_steps_of(
    config: ResolvedConfig,
    info: ModelInfo,
    model: ServedModel,
    cache: KVCache,
    tokens: SlotTokens,
    implementation: Implementation | None,
    pool: AdapterPool | None = None,
) -> FusedSteps | None:
    """The fused way of running a model, ready for its first step; None where there is none. Raises StartupError.

    Without an implementation: on a GPU if --attention-backend says so. `pool`: of its LoRA adapters.
    """
    device = tokens.values.device
    if isinstance(model, Decoder) and is_fused(config, info, model, device, implementation):
        chosen = implementation or "triton"
        steps = make_fused_steps(config, model, cache, tokens, info.context_length, chosen, pool=pool)
        steps.begin()
        return steps
    if implementation is not None or device.type != "cpu":
        if config.enable_deterministic_inference:
            raise StartupError(NOT_FUSED.format(info.architecture))
        if implementation is not None or config.attention_backend != "torch_native":
            log.info("No fused operations for this model: it runs on plain torch, without CUDA graphs.")
    return None


def is_fused(
    config: ResolvedConfig,
    info: ModelInfo,
    model: ServedModel,
    device: torch.device,
    implementation: Implementation | None,
) -> bool:
    """Whether a model runs on fused operations: see fused_steps_of."""
    if implementation is None and (device.type == "cpu" or config.attention_backend == "torch_native"):
        return False
    return info.embedding is None and isinstance(model, Decoder) and can_fuse(model.spec)
