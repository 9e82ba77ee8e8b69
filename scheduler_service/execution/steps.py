"""The description of a step, and how every step runs through a model.

EagerSteps (eager_steps.py)    operation by operation
FusedSteps (fused_steps.py)    on fused operations; decode steps on buffers that stay in place, recorded as graphs
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.inputs import (
    Inputs,
    add_attended,
    add_embeds,
    add_token_types,
    make_inputs,
    to_device,
)
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.launched_step import State
from quartet.scheduler_service.execution.verification import LogitRows
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows


@dataclass(slots=True)
class Step:
    """One step to compute."""

    plan: Plan
    states: list[State]  # by slice
    drawing: LogitRows  # the rows to draw tokens from; may be empty
    experts: Chosen | None = None  # collects the choices of experts; None if no request asks for them


@dataclass(slots=True)
class Computed:
    """The results of a step, on the device: the hidden states, or for a decode step on fixed buffers the logits."""

    inputs: Inputs | None = None
    hidden: torch.Tensor | None = None  # (tokens, hidden), or (drawn, hidden) where no others are wanted
    logits: torch.Tensor | None = None  # (rows, vocab) float32
    draws: Draws | None = None  # already written to the slots; None if nothing was drawn yet


class Steps(ABC):
    """Computes the steps of one model on one device."""

    reads_slots = False  # whether decode steps take their tokens from the slots

    def __init__(self, model: ServedModel, cache: KVCache, tokens: SlotTokens) -> None:
        self.model = model
        self.cache = cache
        self.tokens = tokens
        self.device = tokens.values.device
        self.logits_room = torch.empty(0, model.vocab_size)

    @abstractmethod
    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        """Hidden states of the step's tokens (tokens, hidden); their keys and values are in the pool afterwards."""

    def decode(self, step: Step) -> Computed | None:
        """Compute a decode step on fixed buffers; None if the step cannot run on them."""
        return None

    def run(self, step: Step) -> Computed:
        """Compute a step. Nothing is waited for."""
        decoded = self.decode(step)
        if decoded is not None:
            return decoded
        inputs = self.inputs(step)
        return Computed(inputs, self.forward(step.plan, inputs, step.experts))

    def inputs(self, step: Step) -> Inputs:
        """The step's tokens, on the device."""
        plan, states = step.plan, step.states
        runs = [state.runs.of(share.sequence) for state, share in zip(states, plan.slices, strict=True)]
        inputs = make_inputs(plan, runs, [state.last_token for state in states], self.cache.page_size)
        add_embeds(inputs, plan, self.model.hidden_size)
        add_token_types(inputs, plan)
        add_attended(inputs, plan)
        to_device(inputs, self.device)
        ahead = [i for i, state in enumerate(states) if state.unseen]
        if ahead:
            rows = [inputs.offsets[i] for i in ahead]
            self.tokens.read(inputs.input_ids, rows, [plan.slices[i].sequence.slot for i in ahead])
        return inputs

    def logits(self, step: Step, computed: Computed) -> torch.Tensor:
        """The logits of step.drawing (rows, vocab), float32. On a CPU the next call overwrites them."""
        if computed.logits is not None:
            return computed.logits
        assert computed.inputs is not None and computed.hidden is not None
        places, hidden = step.drawing.places(step.plan, computed.inputs.offsets), computed.hidden
        if len(places) != len(hidden):  # else all rows are drawn from, or the others were left out
            hidden = hidden[upload(places, self.device)]
        return self.to_logits(hidden, self.room_for_logits(len(places)))

    def to_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        return self.model.logits(hidden, out)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        """One token per row of logits (rows, vocab): see model.backend.Backend.sample."""
        return self.model.sample(logits, rows, allowed, keep_logits)

    def room_for_logits(self, rows: int) -> torch.Tensor | None:
        """The buffer for a CPU step's logits. It is kept: fresh memory in every step would cost page faults."""
        if self.device.type != "cpu":
            return None  # the host may still read the last step's logits when the next step writes its own
        if rows > len(self.logits_room):
            self.logits_room = torch.empty(rows, self.model.vocab_size)
        return self.logits_room[:rows]

    # Only recorded steps have these

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs."""
        return False

    @property
    def graph_gigabytes(self) -> float:
        """GB of memory that recorded steps use."""
        return 0.0

    def idle_work(self) -> bool:
        """Do a piece of work while the server is idle; returns whether there is more to do."""
        return False

    def forget(self) -> None:  # noqa: B027
        """Call after an exception: the state on the device may come from a step that failed."""

    def forget_graphs(self) -> None:  # noqa: B027
        """Drop recorded steps: memory whose address they contain has moved."""
