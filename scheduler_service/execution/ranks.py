"""The other ranks of a model in tensor parallel, as rank 0 leads them.

Rank 0 is the scheduler. It plans, draws and sends; before each piece of work in which all ranks take part it tells the
others (`rank_messages.py`), and then does its own part. The collective operations inside keep the ranks in step. The
others know no requests: they have a part of the weights, and a KV pool with the same pages.

A rank that ends takes all with it: rank 0 sees its end, and the others die with rank 0. A rank that hangs holds rank 0
inside an operation, where the launcher's watchdog finds it. The launcher starts the scheduler again, as one process.
"""

import itertools
import logging
import os
import select
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import torch

from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process import vitals
from quartet.runtime.process.parent_death import arm_death_signal
from quartet.runtime.service import EXIT_STARTUP, REPORTED, Boot, refuse
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution import remote_ranks
from quartet.scheduler_service.execution.adapters import named_by
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.eager_steps import Attention, EagerSteps
from quartet.scheduler_service.execution.experts import Chosen
from quartet.scheduler_service.execution.inputs import Inputs
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.rank_messages import (
    Answer,
    Channel,
    Logits,
    Meet,
    Meeting,
    Message,
    Pool,
    Start,
    TierReport,
    forward_message,
)
from quartet.scheduler_service.execution.state_cache import StateCache
from quartet.scheduler_service.host.background import Turn
from quartet.scheduler_service.host.parallel import LOST, TCP, Parallel, Store, join, open_store
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.registry import load_model

log = logging.getLogger(__name__)

Result = TypeVar("Result")

MODULE = "quartet.scheduler_service.follower"
LOOK_S = 0.01  # whether ranks have met a trainer
OWN_WORDS_S = 2.0  # rank 0 has the same cause to refuse a start as the others, and says it itself


class Followers:
    """The other ranks, as rank 0 reaches them."""

    def __init__(self, parallel: Parallel, channels: Sequence[Channel]) -> None:
        """`channels`: of ranks 1, 2, ..."""
        self.parallel = parallel
        self.channels = channels
        self._asking = Turn()  # to receive
        self._reports: deque[TierReport] = deque()  # that came while an answer was waited for
        self._numbers = itertools.count()  # of meetings
        self._met: dict[int, dict[int, Answer]] = {}  # likewise, of meetings that are not over, by channel

    @property
    def busy(self) -> bool:
        """Whether they are asked something and have not all answered; meetings do not count."""
        return self._asking.taken

    def tell(self, message: Message) -> None:
        """Send a message to all of them, from any thread. Raises OSError when one has ended."""
        for channel in self.channels:
            channel.send(message)

    def answers(self) -> list[Answer]:
        """Wait for what came of a task, from each. Raises ConnectionError when one has ended."""
        return [self._answer_of(number) for number in range(len(self.channels))]

    def _answer_of(self, number: int) -> Answer:
        while True:
            found = self.channels[number].receive()
            if isinstance(found, Answer) and found.meeting is None:
                return found
            self._put_by(number, found)

    def _put_by(self, number: int, found: Message | None) -> None:
        """Keep what somebody else waits for."""
        match found:
            case TierReport():
                self._reports.append(found)
            case Answer(meeting=int(meeting)):
                self._met[meeting][number] = found
            case _:
                raise ConnectionError("a rank has ended")

    def _look(self) -> None:
        """Take what has come; not while somebody waits for an answer, who takes that too."""
        if not self._asking.take(wait=False):
            return
        try:
            for number, channel in enumerate(self.channels):
                while channel.waits(0):
                    self._put_by(number, channel.receive())
        finally:
            self._asking.leave()

    def reports(self) -> Iterator[TierReport]:
        """What the others have reported by now. Raises ConnectionError when one has ended."""
        self._look()
        while self._reports:
            yield self._reports.popleft()

    def together(self, task: Message, own: Callable[[], Result]) -> tuple[Result, list[Any]]:
        """Have all ranks do what is answered: rank 0's result, and the answers of the others; one task at a time.

        Raises what `own` raises, and CommandRefused where another rank refuses; all have done their part by then.
        """
        with self._asking:
            self.tell(task)
            try:
                result = own()
            finally:
                answers = self.answers()
        return result, agreed_values(answers)

    def meet(self, task: Meeting, own: Callable[[], None]) -> None:
        """Have all ranks meet a trainer, who may let them wait: beside what else they are asked, and other meetings.

        Raises as `together` does. Runs in the background. Those of one group follow each other.
        """
        number = next(self._numbers)
        self._met[number] = met = dict[int, Answer]()
        self.tell(Meet(number, task))
        try:
            own()
        finally:
            while len(met) < len(self.channels):
                time.sleep(LOOK_S)
                self._look()
            del self._met[number]
        agreed_values([met[channel] for channel in range(len(self.channels))])


def agreed_values(answers: Sequence[Answer]) -> list[Any]:
    """What came of a task, by rank. Raises CommandRefused where one has refused it."""
    for rank, answer in enumerate(answers, 1):
        if answer.refusal:
            raise CommandRefused(f"{answer.refusal} (rank {rank})", answer.status)
    return [answer.value for answer in answers]


def parallel_of(config: ResolvedConfig, rank: int) -> Parallel:
    """One rank of a model's group."""
    return Parallel(rank, config.tp_size, in_order=config.enable_deterministic_inference)


def start_followers(boot: Boot, config: ResolvedConfig, info: ModelInfo) -> tuple[Followers, Store]:
    """Start the processes of the other ranks of this machine, and wait for those of others; also where all meet.

    Call from the main thread: they die with it. Raises StartupError.
    """
    parallel = parallel_of(config, 0)
    # each rank gets its share of the cores
    threads = max(1, torch.get_num_threads() // config.ranks_here)
    torch.set_num_threads(threads)
    place = (
        str(Path(boot.run_dir) / f"{boot.key}.ranks.{boot.epoch}")
        if config.nnodes == 1
        else f"{TCP}{config.dist_init_addr}"
    )
    listener = remote_ranks.listen(config) if config.nnodes > 1 else None
    store = open_store(parallel, place)
    channels = [start_follower(boot, rank) for rank in range(1, config.ranks_here)]
    if listener is not None:
        channels += remote_ranks.wait_for(store, config, listener)
    for rank, channel in enumerate(channels, 1):
        title = f"{boot.title} TP{rank}"
        channel.send(Start(rank, parallel.size, config, info, place, os.getpid(), threads, title))
    return Followers(parallel, channels), store


def start_follower(boot: Boot, rank: int) -> Channel:
    """Start the process of a rank, whose standard input is its channel, and have its end watched."""
    own, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-m", MODULE],
            stdin=theirs.fileno(),
            preexec_fn=partial(arm_death_signal, os.getpid()),
        )
    threading.Thread(target=watch, args=(boot, rank, process), name=f"rank {rank}", daemon=True).start()
    return Channel(own)


def watch(boot: Boot, rank: int, process: "subprocess.Popen[bytes]") -> NoReturn:
    """End this process, and so the group, when a rank has ended, or was stopped for long."""
    stopped = has_ended_or_was_stopped(process, boot.config.watchdog_timeout)
    if stopped:
        log.critical("Rank %d (pid %d) %s; killing it.", rank, process.pid, stopped)
        process.kill()
    status = process.wait()
    if boot.ready_fd != REPORTED:
        time.sleep(OWN_WORDS_S)
    if boot.ready_fd != REPORTED:
        refuse(boot, StartupError(f"rank {rank} ended while starting; its last lines are above"))
        os._exit(EXIT_STARTUP)
    log.critical("Rank %d (pid %d) ended with status %d. Ending the group.", rank, process.pid, status)
    os._exit(LOST)


def has_ended_or_was_stopped(process: "subprocess.Popen[bytes]", timeout_s: float) -> str:
    """Wait for either; how long it was stopped, in words; empty: it has ended. `timeout_s`: --watchdog-timeout.

    The launcher sees rank 0 only, whose pulse goes on while it waits for the others.
    """
    timer = vitals.StopTimer(partial(vitals.read_vitals, process.pid))
    pidfd = os.pidfd_open(process.pid)
    try:
        poll = select.poll()
        poll.register(pidfd, select.POLLIN)
        while not poll.poll(vitals.LOOK_EVERY_S * 1000):
            limit_s, stopped_s = min(timeout_s, vitals.FROZEN_S), timer.stopped_s(time.monotonic())
            if 0 < limit_s < stopped_s:
                return f"was stopped for {stopped_s:.0f} s"
        return ""
    finally:
        os.close(pidfd)


def load_part(
    config: ResolvedConfig, info: ModelInfo, device: torch.device, parallel: Parallel, store: Store
) -> ServedModel:
    """Meet the other ranks, and load one rank's part; all have theirs when this returns. Raises StartupError."""
    if device.type == "cuda" and torch.cuda.device_count() < config.ranks_here:
        raise StartupError(f"--tp-size {parallel.size}: this machine has {torch.cuda.device_count()} GPUs")
    join(parallel, device, store)
    model = load_model(config, info, device, parallel)
    parallel.sum(torch.zeros(1, device=device))  # memory is measured when all have taken theirs
    return model


class LeadingSteps(EagerSteps):
    """Steps of rank 0. An error leaves the others inside an operation, so it ends the group."""

    def __init__(
        self,
        model: ServedModel,
        cache: KVCache,
        tokens: SlotTokens,
        attention: Attention,
        followers: Followers,
        states: StateCache | None = None,
    ) -> None:
        """`states`: of a model with recurrent layers; the others have as many."""
        super().__init__(model, cache, tokens, attention, states)
        self.followers = followers
        sizes = (0, 0) if states is None else (states.slots, states.snapshots)
        followers.tell(Pool(cache.page_count, cache.page_size, *sizes))

    def forward(self, plan: Plan, inputs: Inputs, record_experts: Chosen | None = None) -> torch.Tensor:
        """See Steps.forward."""
        named = named_by(plan) if self.adapters is not None and self.adapters.uses(plan) else None
        return self.together(forward_message(inputs, named), partial(super().forward, plan, inputs, record_experts))

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
