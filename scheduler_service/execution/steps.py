"""One description of a step, and the one path that every step takes through a model, however it is computed.

EagerSteps (eager_steps.py)    operation by operation
FusedSteps (fused_steps.py)    on fused operations; decode steps on buffers that stay in place, recorded as graphs
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch

from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.inputs import Inputs, add_embeds, add_token_types, make_inputs, to_device
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.launched import State
from quartet.scheduler_service.execution.verification import LogitRows
from quartet.scheduler_service.host.transfer import upload
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.sampling.rows import Draws, SamplingRows


@dataclass(slots=True)
class Step:
    """What is to be computed at once."""

    plan: Plan
    states: list[State]  # by slice
    drawing: LogitRows  # what tokens are drawn from; maybe nothing
    experts: Chosen | None = None  # collects the choices of experts; None where nobody wants them


@dataclass(slots=True)
class Computed:
    """What a step gave, on the device: all hidden states, or of a decode step the logits at once."""

    inputs: Inputs | None = None
    hidden: torch.Tensor | None = None  # (tokens, hidden)
    logits: torch.Tensor | None = None  # (rows, vocab) float32
    draws: Draws | None = None  # in the slots already; None where the logits are still to be adjusted and drawn from


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
        """The logits of a decode step that is kept ready; None for any other step."""
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
        to_device(inputs, self.device)
        ahead = [i for i, state in enumerate(states) if state.unseen]
        if ahead:
            rows = [inputs.offsets[i] for i in ahead]
            self.tokens.read(inputs.input_ids, rows, [plan.slices[i].sequence.slot for i in ahead])
        return inputs

    def logits(self, step: Step, computed: Computed) -> torch.Tensor:
        """Those of step.drawing, (rows, vocab) float32. On a CPU the next call overwrites them."""
        if computed.logits is not None:
            return computed.logits
        assert computed.inputs is not None and computed.hidden is not None
        places = upload(step.drawing.places(step.plan, computed.inputs.offsets), self.device)
        return self.to_logits(computed.hidden[places], self.room_for_logits(len(places)))

    def to_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """(rows, hidden) → float32 (rows, vocab), into `out` if there is one."""
        return self.model.logits(hidden, out)

    def sample(
        self, logits: torch.Tensor, rows: SamplingRows, allowed: torch.Tensor | None = None, keep_logits: bool = False
    ) -> Draws:
        """One token per row of logits (rows, vocab): see model.backend.Backend.sample."""
        return self.model.sample(logits, rows, allowed, keep_logits)

    def room_for_logits(self, rows: int) -> torch.Tensor | None:
        """Where a step on the CPU writes its logits; memory that came anew with every step would cost page faults."""
        if self.device.type != "cpu":
            return None  # a step may begin before the one before it has been read
        if rows > len(self.logits_room):
            self.logits_room = torch.empty(rows, self.model.vocab_size)
        return self.logits_room[:rows]

    # What only recorded steps have

    @property
    def uses_graphs(self) -> bool:
        """Whether decode steps are replayed as CUDA graphs."""
        return False

    @property
    def graph_gigabytes(self) -> float:
        """Memory that recorded steps took."""
        return 0.0

    def idle_work(self) -> bool:
        """Use a pause of the server; returns whether there is more to do."""
        return False

    def forget(self) -> None:  # noqa: B027
        """After an exception: what is on the device may be of a step that failed."""

    def forget_graphs(self) -> None:  # noqa: B027
        """Memory that recorded steps name has moved."""
