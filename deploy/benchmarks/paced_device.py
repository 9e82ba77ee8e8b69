"""A device that takes a given time for a step while the CPU is free, as a GPU does: it waits in place of computing.

The scheduler, the planner, the worker, the launch of a decode step (`FusedSteps.replay`) and of its draw, and the
grammars are the real ones, in this process. A forward pass is an entry in the device's time. What is drawn is a given
text (written_text.py). With and without a schema the tokens are the same, and so is the work of the device, but for
the draw behind a mask, whose time is given too. With drafts a verification takes as long as any other step.

The host's time is the CPU time of this process and the time that it has waited for the device: that of a host which
nobody disturbs.
What is not in it: the calls of CUDA that launch a graph, copies and a draw, and the other processes of a server.
"""

import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from deploy.benchmarks.written_text import LoneScheduler, Texts, Writing, WritingWorker
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.fused_steps import FusedSteps
from quartet.scheduler_service.execution.graphs import Key, PlainRecorder
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.launched_step import Drawn
from quartet.scheduler_service.execution.steps import Computed, Step, Steps
from quartet.scheduler_service.grammar.masks import Begun
from quartet.scheduler_service.host.transfer import Arrival
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.fused_backend import FusedBackend
from quartet.scheduler_service.sampling.rows import Draws

CONTEXT = 4096


class Device:
    """Work in the order in which it was given, each piece for a time."""

    def __init__(self, step_s: float, draw_s: float) -> None:
        self.step_s, self.draw_s = step_s, draw_s  # what a step and a draw behind a mask take
        self.done_s = 0.0  # when all of it is
        self.waited_s = 0.0  # by the host

    @property
    def now_s(self) -> float:
        """The time of a host that nobody disturbs."""
        return time.process_time() + self.waited_s

    def work(self, seconds: float) -> None:
        self.done_s = max(self.done_s, self.now_s) + seconds


class Moment(Arrival):
    """When the device has done all that it was given so far."""

    def __init__(self, device: Device) -> None:
        super().__init__(torch.device("cpu"))
        self._device, self._done_s = device, device.done_s

    def wait(self) -> None:
        if (left_s := self._done_s - self._device.now_s) > 0:
            time.sleep(left_s)
            self._device.waited_s += left_s


class PacedSteps(FusedSteps):
    """Steps on a paced device. Their tokens are those of the texts."""

    def pace(self, device: Device, writing: Writing) -> None:
        """Call it before anything else."""
        self.paced, self.writing = device, writing
        ops = SimpleNamespace(process_logits=self.mask, select=self.choose)
        self.backend.sampling.ops = ops

    def compute(self, key: Key) -> None:
        self.paced.work(self.paced.step_s)

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        self.paced.work(self.paced.step_s)
        return torch.zeros(inputs.offsets[-1], self.model.hidden_size, dtype=self.model.dtype)

    def logits(self, step: Step, computed: Computed) -> torch.Tensor:
        self.writing.look(step)
        if isinstance(computed.draws, Draws):
            draws = self.writing.draws()
            computed.draws.tokens, computed.draws.valid = draws.tokens, draws.valid
        rows = len(step.drawing.positions)
        return torch.empty(rows, self.model.vocab_size) if computed.logits is None else computed.logits

    def mask(self, logits: torch.Tensor, allowed: torch.Tensor | None, *_: torch.Tensor) -> None:
        self.paced.work(self.paced.draw_s)
        self.writing.check(allowed)

    def choose(self, *tensors: torch.Tensor) -> None:
        *_, tokens, valid = tensors
        draws = self.writing.draws()
        tokens.copy_(draws.tokens)
        valid.copy_(draws.valid)


class PacedWorker(WritingWorker):
    """A worker whose device is paced."""

    def __init__(self, directory: Path, streams: int, texts: Texts, drafts: bool, device: Device) -> None:
        self.paced = device
        super().__init__(directory, streams, texts, drafts, depth=0 if drafts else 1, implementation="torch")

    @property
    def is_apart(self) -> bool:
        return True

    def make_steps(self, *_: Any) -> Steps:
        model, cache = self.model, self.cache
        assert isinstance(model, Decoder)
        backend = FusedBackend(model.spec.ropes, model.dtype, model.device, "torch", CONTEXT, False, False, None)
        steps = PacedSteps(model.on(backend), backend, cache, self.tokens, CONTEXT)
        steps.pace(self.paced, self.writing)
        steps.use_graphs(PlainRecorder(), self.max_running_requests)
        steps.begin()
        return steps

    def draw(self, step: Step, computed: Computed, masks: Begun | None = None) -> Drawn:
        drawn = super().draw(step, computed, masks)
        drawn.arrival = Moment(self.paced)
        return drawn


class PacedScheduler(LoneScheduler):
    """A scheduler on a paced device."""

    def __init__(self, directory: Path, streams: int, tokens: int, drafts: bool, step_s: float, draw_s: float) -> None:
        self.device = Device(step_s, draw_s)
        super().__init__(directory, streams, tokens, drafts)

    def make_worker(self, directory: Path, texts: Texts, drafts: bool) -> WritingWorker:
        return PacedWorker(directory, self.streams, texts, drafts, self.device)

    @property
    def now_s(self) -> float:
        return self.device.now_s
