"""Planner and worker in one process, without sockets: the scheduler's loop, for measurements.

Weights are random, made on the device; prompts are random ids.
"""

import random
import time
from collections import deque
from dataclasses import dataclass, field
from typing import Any

import torch

from quartet.runtime.config import ResolvedConfig, ServerConfig
from quartet.runtime.messages import Request, Tokenized, pack_ids
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.settings.machine import Machine
from quartet.runtime.settings.resolve import resolve
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.execution.launched_step import LaunchedStep
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.dtype import DTYPES
from quartet.scheduler_service.model.layout import decoder_layout
from quartet.scheduler_service.model.registry import decoder_spec
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.weights.parameters import Weights

SCALE = 0.02
SPARE_TOKENS = 4096


def model_info(config: dict[str, Any], context_length: int) -> ModelInfo:
    return ModelInfo(
        path="",
        architecture=config["architectures"][0],
        model_type=config["model_type"],
        vocab_size=config["vocab_size"],
        hidden_size=config["hidden_size"],
        context_length=min(context_length, config["max_position_embeddings"]),
        eos_ids=[0],
        config=config,
    )


def random_model(settings: ResolvedConfig, info: ModelInfo, device: torch.device) -> ServedModel:
    """Weights that are never zeros: multiplying zeros is faster than multiplying numbers."""
    spec = decoder_spec(info)
    weights = Weights(decoder_layout(spec), DTYPES[info.config["torch_dtype"]], device)
    model = Decoder(spec, weights, TorchBackend(spec.ropes, weights.dtype, device))
    for buffer in weights.buffers.values():
        buffer.normal_(0.0, SCALE)
    weights.after_update()
    return model


@dataclass(slots=True)
class Run:
    """One way through the loop, from the first request to the last token."""

    tokens: int = 0
    begun: float = field(default_factory=time.perf_counter)
    ended: float = 0.0
    step_ends: list[float] = field(default_factory=list)
    first_token_s: dict[str, float] = field(default_factory=dict)  # since the run began
    outputs: dict[str, list[int]] = field(default_factory=dict)

    @property
    def seconds(self) -> float:
        return self.ended - self.begun

    @property
    def tokens_per_s(self) -> float:
        return self.tokens / self.seconds

    def largest_gap_s(self) -> float:
        """Between two steps that gave tokens."""
        return max((b - a for a, b in zip(self.step_ends, self.step_ends[1:], strict=False)), default=0.0)


class Engine:
    """Serves requests made of token ids."""

    def __init__(
        self,
        config: dict[str, Any],
        device: torch.device,
        context_length: int = 4096,
        running: int = 256,
        pool_tokens: int | None = None,
        **settings: Any,
    ) -> None:
        settings = {"chunked_prefill_size": 8192, "max_total_tokens": pool_tokens, **settings}
        given = ServerConfig(device=device.type, max_running_requests=running, **settings)
        has_gpu = device.type == "cuda"  # or a simulated one
        self.config = resolve(given, Machine(has_gpu=has_gpu, torch_has_cuda=has_gpu)).config
        info = model_info(config, context_length)
        implementation = "torch" if device.type == "cpu" else None  # a rehearsal takes the same way
        self.worker = Worker(self.config, info, load=random_model, implementation=implementation)
        self.vocab_size = config["vocab_size"]
        self.planner = Planner(
            PlannerConfig(
                page_size=self.worker.page_size,
                total_pages=self.worker.page_count,
                max_running=self.worker.max_running_requests,
                context_length=info.context_length,
                vocab_size=info.vocab_size,
                chunked_prefill_size=self.config.chunked_prefill_size,
                reuse_prefixes=False,
            )
        )
        self.in_flight: deque[tuple[Plan, LaunchedStep]] = deque()
        self.requests = 0
        while self.worker.idle_work():
            pass  # measure what is recorded

    def prompt(self, length: int, seed: int = 0) -> list[int]:
        draw = random.Random(seed)
        return [draw.randrange(1, self.vocab_size) for _ in range(length)]

    def add(self, prompt: list[int], new_tokens: int, temperature: float = 0.0, seed: int = 0) -> str:
        rid = f"r{self.requests}"
        self.requests += 1
        params = SamplingParams(temperature=temperature, max_new_tokens=new_tokens, ignore_eos=True)
        request = Request(rid=rid, params=params, seed=seed)
        assert not self.planner.add(Tokenized(request=request, prompt_ids=pack_ids(prompt)), 0.0)
        return rid

    def run(self, most_steps: int | None = None) -> Run:
        """Until all requests have ended, or so many steps have been launched."""
        run, launched = Run(), 0
        while most_steps is None or launched < most_steps:
            launched += 1
            if not self.step(run):
                break
        while self.in_flight:
            self.land(run)
        run.ended = time.perf_counter()
        return run

    def step(self, run: Run) -> bool:
        """One turn of the loop; False when there was nothing to do."""
        plan = self.planner.next(time.monotonic())
        self.forget()
        if plan:
            self.in_flight.append((plan, self.worker.launch(plan)))
        while len(self.in_flight) > (self.worker.depth if plan else 0):
            self.land(run)
        return plan is not None

    def land(self, run: Run) -> None:
        plan, pending = self.in_flight.popleft()
        updates = self.planner.apply(plan, self.worker.collect(pending), 0.0)
        self.forget()
        now = time.perf_counter()
        for update in updates:
            if update.finish is not None and update.finish.reason != "length":
                raise RuntimeError(f"{update.sequence.rid} ended with {update.finish}")
            run.tokens += len(update.ids) // 4
            if update.first:
                run.first_token_s[update.sequence.rid] = now - run.begun
            if update.finish is not None:
                run.outputs[update.sequence.rid] = list(update.sequence.ids[update.sequence.prompt_len :])
        if updates:
            run.step_ends.append(now)

    def forget(self) -> None:
        for sequence in self.planner.released:
            self.worker.forget(sequence)
        self.planner.released.clear()

    def abort_all(self) -> None:
        for rid in list(self.planner.live):
            self.planner.abort(rid)
        self.forget()
