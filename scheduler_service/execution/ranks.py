"""The other ranks of a model in tensor parallel, as rank 0 leads them and as they follow.

Rank 0 is the scheduler. It plans, draws and sends; before each piece of work in which all ranks take part it writes
a description to the others' standard inputs, and then computes its own part. The collective operations inside keep the
ranks in step. The others know no requests: they have a part of the weights, and a KV pool with the same pages.

A rank that ends takes all with it: rank 0 sees its end, and the others die with rank 0. A rank that hangs holds rank 0
inside an operation, where the launcher's watchdog finds it. The launcher starts the scheduler again, as one process.
"""

import logging
import os
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import IO, NoReturn

import msgspec
import torch

from quartet.kernels.cpu.attention_schedule import Ragged
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.service import EXIT_STARTUP, REPORTED, Boot, refuse
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.eager_steps import Attention, EagerSteps
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import KVCache, Placement
from quartet.scheduler_service.host.parallel import LOST, Parallel, join
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.registry import load_model

log = logging.getLogger(__name__)

MODULE = "quartet.scheduler_service.follower"
LENGTH = struct.Struct("<Q")
OWN_WORDS_S = 2.0  # rank 0 has the same cause to refuse a start as the others, and says it itself


class Start(msgspec.Struct, tag=True):
    """The first message to a rank."""

    rank: int
    size: int
    config: ResolvedConfig
    store: str  # the file through which the ranks meet
    parent_pid: int
    threads: int


class Pool(msgspec.Struct, tag=True):
    """The size of every rank's KV pool; sent once, when the weights are loaded."""

    page_count: int
    page_size: int


class Forward(msgspec.Struct, tag=True):
    """A forward pass: `execution.inputs.Inputs` with tensors as bytes."""

    input_ids: bytes  # int64
    positions: bytes  # int64
    slots: bytes  # int64
    begun: bytes  # int64; empty: none
    starts: list[int]
    query_lengths: list[int]
    context_lengths: list[int]
    runs: list[list[tuple[int, int]]]
    embeds: bytes = b""  # float32 (tokens, hidden)
    embeds_mask: bytes = b""  # bool


class Logits(msgspec.Struct, tag=True):
    """Logits of so many rows of hidden states, which rank 0 broadcasts."""

    rows: int


Message = Start | Pool | Forward | Logits
DECODER = msgspec.msgpack.Decoder(Message)


def write_message(pipe: IO[bytes], message: Message) -> None:
    data = msgspec.msgpack.encode(message)
    pipe.write(LENGTH.pack(len(data)) + data)
    pipe.flush()


def read_message(pipe: IO[bytes]) -> Message | None:
    """The next message; None when nobody writes any more."""
    head = pipe.read(LENGTH.size)
    if len(head) < LENGTH.size:
        return None
    found: Message = DECODER.decode(pipe.read(LENGTH.unpack(head)[0]))
    return found


class Followers:
    """The processes of the other ranks, as rank 0 has them."""

    def __init__(self, boot: Boot) -> None:
        """Start them. Call from the main thread: they die with it."""
        self.boot = boot
        self.parallel = Parallel(0, boot.config.tp_size)
        # each rank gets its share of the cores
        threads = max(1, torch.get_num_threads() // self.parallel.size)
        torch.set_num_threads(threads)
        self.store = str(Path(boot.run_dir) / f"ranks.{boot.epoch}")
        self.processes = [self.start(rank, threads) for rank in range(1, self.parallel.size)]

    def start(self, rank: int, threads: int) -> "subprocess.Popen[bytes]":
        """Start the process of a rank and have its end watched."""
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=subprocess.PIPE,
            preexec_fn=partial(arm_death_signal, os.getpid()),
        )
        threading.Thread(target=self.watch, args=(rank, process), name=f"rank {rank}", daemon=True).start()
        assert process.stdin is not None
        config = self.boot.config
        write_message(
            process.stdin,
            Start(rank, self.parallel.size, config, self.store, os.getpid(), threads),
        )
        return process

    def watch(self, rank: int, process: "subprocess.Popen[bytes]") -> NoReturn:
        """End this process, and so the group, when a rank has ended."""
        status = process.wait()
        if self.boot.ready_fd != REPORTED:
            time.sleep(OWN_WORDS_S)
        if self.boot.ready_fd != REPORTED:
            refuse(self.boot, StartupError(f"rank {rank} ended while starting; its last lines are above"))
            os._exit(EXIT_STARTUP)
        log.critical("Rank %d (pid %d) ended with status %d. Ending the group.", rank, process.pid, status)
        os._exit(LOST)

    def load(self, config: ResolvedConfig, info: ModelInfo, device: torch.device) -> ServedModel:
        """Meet the other ranks and load this one's part of the model; all have done so when this returns."""
        return load_part(config, info, device, self.parallel, self.store)

    def tell(self, message: Message) -> None:
        """Send a message to all of them."""
        for process in self.processes:
            assert process.stdin is not None
            write_message(process.stdin, message)


def load_part(
    config: ResolvedConfig, info: ModelInfo, device: torch.device, parallel: Parallel, store: str
) -> ServedModel:
    """Meet the other ranks, and load one rank's part; all have theirs when this returns. Raises StartupError."""
    if device.type == "cuda" and torch.cuda.device_count() < parallel.size:
        raise StartupError(f"--tp-size {parallel.size}: this machine has {torch.cuda.device_count()} GPUs")
    join(parallel, device, store)
    model = load_model(config, info, device, parallel)
    parallel.sum(torch.zeros(1, device=device))  # memory is measured when all have taken theirs
    return model


class LeadingSteps(EagerSteps):
    """Steps of rank 0. An error leaves the others inside an operation, so it ends the group."""

    def __init__(
        self, model: ServedModel, cache: KVCache, tokens: SlotTokens, attention: Attention, followers: Followers
    ) -> None:
        super().__init__(model, cache, tokens, attention)
        self.followers = followers
        followers.tell(Pool(cache.page_count, cache.page_size))

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        """See Steps.forward."""
        return self.together(forward_message(inputs), partial(super().forward, plan, inputs, record_experts))

    def to_logits(self, hidden: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """See Steps.to_logits."""
        if not len(hidden):
            return super().to_logits(hidden, out)
        hidden = hidden.contiguous()

        def compute() -> torch.Tensor:
            self.followers.parallel.broadcast(hidden)
            return self.model.logits(hidden, out)

        return self.together(Logits(len(hidden)), compute)

    def together(self, message: Message, compute: Callable[[], torch.Tensor]) -> torch.Tensor:
        """Have all ranks do one thing."""
        try:
            self.followers.tell(message)
            return compute()
        except Exception:
            log.critical("Rank 0 failed in a step that all ranks compute. Ending the group.", exc_info=True)
            os._exit(LOST)


def forward_message(inputs: Inputs) -> Forward:
    """A step's inputs as the other ranks get them."""
    ragged, placement = inputs.ragged, inputs.placement
    return Forward(
        input_ids=as_bytes(inputs.input_ids),
        positions=as_bytes(inputs.positions),
        slots=as_bytes(placement.slots),
        begun=as_bytes(placement.begun),
        starts=inputs.offsets,
        query_lengths=ragged.query_lengths,
        context_lengths=ragged.context_lengths,
        runs=ragged.runs,
        embeds=as_bytes(inputs.embeds),
        embeds_mask=as_bytes(inputs.embeds_mask),
    )


def as_bytes(x: torch.Tensor | None) -> bytes:
    """The bytes of a tensor; none of none."""
    return b"" if x is None else x.contiguous().cpu().numpy().tobytes()


def from_bytes(data: bytes, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """A flat tensor of bytes that `as_bytes` gave."""
    return torch.frombuffer(bytearray(data), dtype=dtype).to(device) if data else torch.empty(0, dtype=dtype)


def inputs_of(message: Forward, page_size: int, hidden_size: int, device: torch.device) -> Inputs:
    """The reverse of `forward_message`."""
    begun = from_bytes(message.begun, torch.int64, device) if message.begun else None
    inputs = Inputs(
        input_ids=from_bytes(message.input_ids, torch.int64, device),
        positions=from_bytes(message.positions, torch.int64, device),
        starts=torch.tensor(message.starts, device=device),
        offsets=message.starts,
        ragged=Ragged(message.query_lengths, message.context_lengths, message.runs, page_size),
        placement=Placement(from_bytes(message.slots, torch.int64, device), begun),
    )
    if message.embeds:
        inputs.embeds = from_bytes(message.embeds, torch.float32, device).view(-1, hidden_size)
        inputs.embeds_mask = from_bytes(message.embeds_mask, torch.bool, device)
    return inputs
