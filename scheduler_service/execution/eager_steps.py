"""Steps computed operation by operation, of any model on any device."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from quartet.kernels.cpu.attention import paged_attention
from quartet.kernels.cpu.attention_by_token import paged_attention_by_token
from quartet.kernels.cpu.attention_native import can_attend, page_table, paged_attention_native
from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.kernels.cpu.native.page_table import PageTable, Wanted
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.adapters import CpuAdapters
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.inputs import Inputs, add_wanted
from quartet.scheduler_service.execution.kv_cache import KVCache, Placement
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.execution.steps import Step, Steps
from quartet.scheduler_service.model.batch import AttentionSpec, Batch, ServedModel

Attention = Callable[..., torch.Tensor]  # as quartet.kernels.cpu.attention.paged_attention


@dataclass(slots=True)
class PagedAttend:
    """Attention of one step: writes keys and values to the cache, then attends over the pages."""

    cache: KVCache
    placement: Placement
    ragged: Ragged
    attention: Attention
    wanted: Wanted | None = None

    @property
    def places(self) -> torch.Tensor:
        """(tokens,) int64: where in the pools the tokens' keys and values go."""
        return self.placement.slots

    def pools(self, layer: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.cache.pools(layer, self.placement)

    def begin_pages(self) -> int:
        """See model.batch.PagedAttend."""
        if self.placement.begun is not None:
            for layer in self.cache.keys:
                self.cache.pools(layer, self.placement)
        return self.cache.moved

    def __call__(self, spec: AttentionSpec, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        self.cache.write(spec.layer, self.placement, k, v)
        return self.attend_written(spec, q)

    def attend_written(self, spec: AttentionSpec, q: torch.Tensor) -> torch.Tensor:
        """Attend once keys and values of the batch's tokens are written: q and result (tokens, heads, dim)."""
        return self.attention(
            self.ragged if spec.chunk is None else self.ragged.by_chunk(spec.chunk),
            q,
            self.cache.keys[spec.layer],
            self.cache.values[spec.layer],
            scale=spec.scale,
            window=spec.window,
            softcap=spec.softcap,
            causal=spec.causal,
            sinks=spec.sinks,
        )

    def page_table(self) -> PageTable | None:
        """See model.batch.PagedAttend."""
        return page_table(self.ragged) if self.attention is paged_attention_native else None


def choose_attention(device: torch.device, model: ServedModel, deterministic: bool) -> Attention:
    """The fastest attention of the model's device; `deterministic`: one whose bits follow from a query's context."""
    if device.type == "cpu" and all(can_attend(model.dtype, spec.head_dim) for spec in model.attention):
        return paged_attention_native
    return paged_attention_by_token if deterministic else paged_attention


class EagerSteps(Steps):
    """Runs every plan operation by operation."""

    def __init__(
        self,
        model: ServedModel,
        cache: KVCache,
        tokens: SlotTokens,
        attention: Attention = paged_attention,
        states: StateCache | None = None,
    ) -> None:
        """`states`: of a model with recurrent layers."""
        super().__init__(model, cache, tokens)
        self.attention = attention
        self.states = states
        self.adapters: CpuAdapters | None = None

    def inputs(self, step: Step) -> Inputs:
        """See Steps.inputs."""
        inputs = super().inputs(step)
        if self.device.type == "cpu" and step.experts is None:
            add_wanted(inputs, step.plan, step.drawing.places(step.plan, inputs.offsets))
        if self.states is not None:
            inputs.states = self.states.places(step.plan, inputs.offsets)
        return inputs

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        """See Steps.forward."""
        batch = Batch(
            input_ids=inputs.input_ids,
            positions=inputs.positions,
            attend=PagedAttend(self.cache, inputs.placement, inputs.ragged, self.attention, inputs.wanted),
            starts=inputs.starts,
            token_types=inputs.token_types,
            attended=inputs.attended,
            tasks=tasks_of(plan),
            embeds=inputs.embeds,
            embeds_mask=inputs.embeds_mask,
            record_experts=record_experts,
        )
        if self.states is not None:
            assert inputs.states is not None
            batch.states = self.states.access(inputs.states)
            hidden = self.model.forward(batch)
            self.states.copy(inputs.states.copies)
            return hidden
        if self.adapters is not None and self.adapters.uses(plan):
            with self.adapters.of_step(plan):
                return self.model.forward(batch)
        return self.model.forward(batch)


def tasks_of(plan: Plan) -> list[str] | None:
    """The task of each slice whose adapter it asks for; None where none does."""
    tasks = [share.sequence.request.task_adapter for share in plan.slices]
    return tasks if any(tasks) else None
