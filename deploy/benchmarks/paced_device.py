"""A device that takes a given time for a step while the CPU is free, as a GPU does: it waits in place of computing.

The scheduler, the planner, the worker, the launch of a decode step (`FusedSteps.replay`) and of its draw, and the
grammars are the real ones, in this process. A forward pass is an entry in the device's time. What is drawn is a text
that a good model would write under the schema, a different one for each request. With and without a schema the tokens
are the same, and so is the work of the device, but for the draw behind a mask, whose time is given too.

The host's time is the CPU time of this process and the time that it has waited for the device: that of a host which
nobody disturbs.
What is not in it: the calls of CUDA that launch a graph, copies and a draw, and the other processes of a server.
"""

import json
import random
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from tokenizers import Tokenizer

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Message, Request, Tokenized, pack_ids
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import encode
from quartet.scheduler_service.assemble import planner_config
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.fused_steps import FusedSteps
from quartet.scheduler_service.execution.graphs import Key, PlainRecorder
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.launched_step import Drawn
from quartet.scheduler_service.execution.steps import Computed, Step, Steps
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.grammar.masks import Begun
from quartet.scheduler_service.grammar.matchers import Grammar, GrammarCompiler
from quartet.scheduler_service.host.transfer import Arrival
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.fused_backend import FusedBackend
from quartet.scheduler_service.sampling.rows import Draws
from quartet.scheduler_service.scheduler import Scheduler
from tests.configs import resolved

FIRST_ID = 1000
PROMPT_LEN = 16
CONTEXT = 4096
SETTINGS: dict[str, Any] = {"dtype": "bfloat16", "page_size": 16, "max_total_tokens": 65536}
CITIES = (
    "Paris",
    "London",
    "Berlin",
    "Madrid",
    "Rome",
    "Lisbon",
    "Vienna",
    "Prague",
    "Warsaw",
    "Budapest",
    "Athens",
    "Dublin",
    "Oslo",
    "Stockholm",
    "Bern",
    "Brussels",
)

Texts = dict[int, list[int]]  # the output of each request, by the first id of its prompt


class Round(NamedTuple):
    """Concurrent requests, all together."""

    tokens_per_s: float
    cpu_ms_per_token: float  # of all processes that take part


class Device:
    """Work in the order in which it was given, each piece for a time."""

    def __init__(self) -> None:
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

    def pace(self, device: Device, step_s: float, draw_s: float, texts: Texts) -> None:
        """Call it before anything else."""
        self.paced, self.step_s, self.draw_s, self.texts = device, step_s, draw_s, texts
        self.coming: list[int] = []  # by row
        ops = SimpleNamespace(process_logits=self.mask, select=self.choose)
        self.backend.sampling.ops = ops

    def compute(self, key: Key) -> None:
        self.paced.work(self.step_s)

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        self.paced.work(self.step_s)
        return torch.zeros(inputs.offsets[-1], self.model.hidden_size, dtype=self.model.dtype)

    def logits(self, step: Step, computed: Computed) -> torch.Tensor:
        rows = zip(step.drawing.slices, step.drawing.positions, strict=True)
        self.coming = [self.next_token(step.plan.slices[i].sequence, position) for i, position in rows]
        if isinstance(computed.draws, Draws):
            computed.draws.tokens = torch.tensor(self.coming)
            computed.draws.valid = torch.ones(len(self.coming), dtype=torch.bool)
        return torch.empty(len(self.coming), self.model.vocab_size) if computed.logits is None else computed.logits

    def next_token(self, sequence: Sequence, position: int) -> int:
        return self.texts[sequence.ids[0]][position - sequence.prompt_len]

    def mask(self, logits: torch.Tensor, allowed: torch.Tensor | None, *_: torch.Tensor) -> None:
        self.paced.work(self.draw_s)
        if allowed is not None:
            masks, tokens = allowed.numpy(), np.array(self.coming)
            bits = masks[np.arange(len(tokens)), tokens // 32] >> tokens % 32 & 1
            assert bits.all(), tokens[bits == 0]

    def choose(self, *tensors: torch.Tensor) -> None:
        *_, tokens, valid = tensors
        tokens.copy_(torch.tensor(self.coming))
        valid.fill_(1)


class PacedWorker(Worker):
    """A worker whose device is paced."""

    def __init__(self, directory: Path, streams: int, step_s: float, draw_s: float, texts: Texts) -> None:
        self.paced, self.pace = Device(), (step_s, draw_s, texts)
        settings = {**SETTINGS, "max_running_requests": streams}
        config = resolved(model_path=str(directory), model_dir=str(directory), **settings)
        self.config = config
        super().__init__(config, model_info.load(config), depth=1, implementation="torch")

    def make_steps(self, *_: Any) -> Steps:
        model, cache = self.model, self.cache
        assert isinstance(model, Decoder)
        backend = FusedBackend(model.spec.ropes, model.dtype, model.device, "torch", CONTEXT, False, False, None)
        steps = PacedSteps(model.on(backend), backend, cache, self.tokens, CONTEXT)
        steps.pace(self.paced, *self.pace)
        steps.use_graphs(PlainRecorder(), self.max_running_requests)
        steps.begin()
        return steps

    def draw(self, step: Step, computed: Computed, masks: Begun | None = None) -> Drawn:
        drawn = super().draw(step, computed, masks)
        drawn.arrival = Moment(self.paced)
        return drawn


class Inbox:
    """Gives what was put in, once."""

    def __init__(self) -> None:
        self.messages: list[Message] = []

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        messages, self.messages = self.messages, []
        return messages


class Outbox:
    """Encodes what is sent."""

    def send(self, messages: Any) -> None:
        encode(messages)


class NoProgress:
    def beat(self, busy: bool) -> None:
        pass


class AtOnce:
    """Compiles a grammar when it is asked for."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self.compiler = compiler
        self.compiled: list[tuple[str, Grammar | RequestError]] = []

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        self.compiled.append((rid, self.compiler.compile(kind, text)))

    def cancel(self, rid: str) -> None:
        self.compiled = [one for one in self.compiled if one[0] != rid]

    def ready(self) -> list[tuple[str, Grammar | RequestError]]:
        compiled, self.compiled = self.compiled, []
        return compiled


class PacedServer:
    """A scheduler on a paced device, and the requests that it is given."""

    def __init__(self, directory: Path, streams: int, tokens: int, step_s: float, draw_s: float) -> None:
        tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
        self.streams, self.tokens = streams, tokens
        texts = {FIRST_ID + i: tokenizer.encode(written(i, tokens)).ids for i in range(streams)}
        self.worker = PacedWorker(directory, streams, step_s, draw_s, texts)
        config, info = self.worker.config, self.worker.info
        self.compiler = GrammarCompiler(directory, self.worker.model.vocab_size, info.eos_ids)
        self.inbox = Inbox()
        self.scheduler = Scheduler(
            Planner(planner_config(config, info, self.worker)),
            self.worker,
            self.inbox,
            Outbox(),
            NoProgress(),  # type: ignore[arg-type]
            depth=1,
            grammars=AtOnce(self.compiler),
        )

    def run(self, params: dict[str, Any]) -> Round:
        """Serve all streams, from when the prompts of all have been computed."""
        wanted = SamplingParams(temperature=0.8, ignore_eos=True, **params)
        for i in range(self.streams):
            ids = pack_ids([FIRST_ID + i, *range(PROMPT_LEN - 1)])
            self.inbox.messages.append(Tokenized(request=Request(rid=f"{i:032x}", params=wanted), prompt_ids=ids))
        self.scheduler.step()
        while any(sequence.needs_prefill for sequence in self.scheduler.planner.running):
            self.scheduler.step()
        started_s, cpu_before_s, steps = self.worker.paced.now_s, time.process_time(), 0
        while not self.scheduler.idle:
            self.scheduler.step()
            steps += 1
        taken_s, cpu_s = self.worker.paced.now_s - started_s, time.process_time() - cpu_before_s
        return Round(steps * self.streams / taken_s, cpu_s * 1000 / (steps * self.streams))

    def close(self) -> None:
        self.compiler.close()


def written(number: int, tokens: int) -> str:
    """A list as the schema wants it, of at least so many tokens."""
    draw = random.Random(number)
    entries = [
        {"city": draw.choice(CITIES), "people": draw.randrange(100_000, 10_000_000), "coast": draw.random() < 0.5}
        for _ in range(tokens // 8)
    ]
    return json.dumps(entries)
