"""The process of a rank other than 0: `python -m quartet.scheduler_service.follower`, started by rank 0.

Its standard input is a socket. It does what rank 0 says there (`execution/rank_messages.py`) until that is closed.
"""

import logging
import os
import signal
import socket
import sys
import tempfile
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read once, when torch is imported

import msgspec
import setproctitle
import torch

from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.log import set_up_logging
from quartet.runtime.service import EXIT_STARTUP, TITLE
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.device_state import SlotTokens
from quartet.scheduler_service.execution.eager_steps import EagerSteps, choose_attention
from quartet.scheduler_service.execution.kv_blocks import KvBlocks
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.execution.rank_adapters import FollowingAdapters
from quartet.scheduler_service.execution.rank_memory import FollowingMemory
from quartet.scheduler_service.execution.rank_messages import (
    Adapters,
    Answer,
    Channel,
    Commit,
    DropAdapter,
    DropSecond,
    Forward,
    GiveUp,
    Hello,
    Logits,
    Meet,
    Message,
    OpenTier,
    Pool,
    ReadAdapter,
    Release,
    Resume,
    Start,
    TakeAdapter,
    Tier,
    TierReport,
    Tiers,
    UseTier,
    inputs_of,
)
from quartet.scheduler_service.execution.rank_tier import FollowingTier
from quartet.scheduler_service.execution.rank_updates import FollowingUpdates
from quartet.scheduler_service.execution.ranks import load_part, parallel_of
from quartet.scheduler_service.execution.state_cache import StateCache, implementations
from quartet.scheduler_service.execution.tier_part import facts_of, own_part
from quartet.scheduler_service.host.background import run_in_background
from quartet.scheduler_service.host.device import limit_threads
from quartet.scheduler_service.host.parallel import LOST, Parallel, Store, open_store
from quartet.scheduler_service.model.batch import ServedModel, states_of
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.deterministic import is_asked_for, keep_order
from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)

Work = Generator[None, bool | None, None]

POLL_S = 0.001  # for a message, between two slices of work in the background
MOST_MESSAGES = 16  # between them, where messages come faster than that
NOT_BY_HAND = "ranks are started by the scheduler of `quartet serve --tp-size`"


def main() -> None:
    """Load a part of the model and compute with it until rank 0 ends."""
    try:
        channel = Channel(socket.socket(fileno=os.dup(0)))
    except OSError:
        sys.exit(NOT_BY_HAND)
    start = channel.receive()
    if not isinstance(start, Start) or os.getppid() != start.parent_pid:
        sys.exit(NOT_BY_HAND)
    setproctitle.setproctitle(TITLE.format(role=start.title))
    set_up_logging(start.config, start.title)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 decides
    try:
        parallel = parallel_of(start.config, start.rank)
        follow(start, channel, parallel, open_store(parallel, start.place))
    except StartupError as error:
        log.error("%s: %s", start.title, error)
        os._exit(EXIT_STARTUP)
    except Exception:
        log.exception("%s hit an exception:", start.title)
        os._exit(LOST)
    os._exit(0)


def follow(
    start: Start, channel: Channel, parallel: Parallel, store: Store, report: Callable[[], None] = lambda: None
) -> None:
    """Load the part of the model, and do what the messages say, until there are no more. Raises StartupError.

    `report` is called once the part is loaded.
    """
    torch.set_num_threads(start.threads)
    device = torch.device(start.config.device)
    if device.type == "cuda":
        torch.cuda.set_device(parallel.rank % start.config.ranks_here)
    model = load_part(start.config, start.info, device, parallel, store)
    report()
    if not start.info.is_embedding:
        limit_threads(device, model.hidden_size)
    log.info("Rank %d of %d computes %.2f GB of weights.", parallel.rank, parallel.size, model.weights.nbytes() / 1e9)
    updates = FollowingUpdates(Updates(model.weights, start.config, tempfile.gettempdir()))
    Follower(model, device, channel, parallel, updates).run()


class Follower:
    """One rank's work, message by message."""

    def __init__(
        self,
        model: ServedModel,
        device: torch.device,
        channel: Channel,
        parallel: Parallel,
        updates: FollowingUpdates,
    ) -> None:
        self.model = model
        self.device = device
        self.channel = channel
        self.parallel = parallel
        self.updates = updates
        self.steps: EagerSteps | None = None  # once rank 0 has said how large the KV pool is
        self.memory: FollowingMemory | None = None  # likewise
        self.tier: FollowingTier | None = None  # of KV beyond the pool; None: there is none
        self.job: Work | None = None  # in the background
        self.meetings: list[Work] = []  # likewise, in process groups: each may wait for its trainer; touch no weights
        config = updates.updates.config
        self.adapters: FollowingAdapters | None = None
        if config.enable_lora:
            assert isinstance(model, Decoder)
            self.adapters = FollowingAdapters(model, config)
        self.deterministic = is_asked_for(config, device)
        if self.deterministic:
            keep_order(model.weights)  # with as many threads as will compute

    def run(self) -> None:
        """Do what the messages say until there are no more; between them, a slice of the work in the background."""
        handled = 0  # since the last slice
        while True:
            if (self.job or self.meetings) and (handled >= MOST_MESSAGES or not self.channel.waits(POLL_S)):
                self.work_on()
                handled = 0
            elif (message := self.channel.receive()) is None:
                return
            else:
                self.handle(message)
                handled += 1

    def handle(self, message: Message) -> None:
        """Do what a message says, or begin to."""
        match message:
            case Pool():
                self.take_memory(message)
            case Forward():
                self.forward(message)
            case Logits(rows):
                self.logits(rows)
            case ReadAdapter() | TakeAdapter() | DropAdapter():
                self.adapt(message)
            case Release() | Resume():
                assert self.memory is not None
                self.finish_job()
                self.channel.send(self.memory.do(message))
            case OpenTier() | UseTier() | Tier():
                self.keep(message)
            case DropSecond():
                self.finish_job()
                self.updates.updates.drop_second()
            case Commit():
                if self.memory is not None:
                    self.memory.weights_are_back()
                self.begin(partial(self.updates.updates.free, self.updates.commit()), lambda _: None)
            case GiveUp():
                self.finish_job()
                self.updates.give_up()
            case Meet(number, task):
                self.meetings.append(finished(partial(self.updates.do, task), partial(self.answer_meeting, number)))
            case Start() | Hello() | Answer() | TierReport():
                raise AssertionError(message)
            case task:
                self.begin(partial(self.updates.do, task), self.channel.send)

    def take_memory(self, sizes: Pool) -> None:
        """Make the KV pool, and the recurrent states where the model has some."""
        model, device = self.model, self.device
        cache = KVCache(model.attention, sizes.page_count, sizes.page_size, model.dtype, device)
        states = None
        if specs := states_of(model):
            kernels = implementations(self.updates.updates.config, device)
            states = StateCache(specs, sizes.state_slots, sizes.snapshots, device, *kernels)
        attention = choose_attention(device, model, self.deterministic)
        self.memory = FollowingMemory(self.updates.updates, cache, states)
        self.steps = EagerSteps(model, cache, SlotTokens(1, device), attention, states)
        self.steps.adapters = self.adapters

    def keep(self, message: Tiers) -> None:
        """Do what a message says of the tier behind the KV pool."""
        match message:
            case OpenTier():
                self.finish_job()
                self.channel.send(self.open_tier(message))
            case UseTier(identity):
                assert self.tier is not None
                self.channel.send(self.tier.open(identity))
            case Tier():
                assert self.tier is not None
                if report := self.tier.do(message):
                    self.channel.send(report)

    def open_tier(self, message: OpenTier) -> Answer:
        """Make this rank's part of the tier; on another machine its files are where that one's flag says."""
        assert self.steps is not None
        config = self.updates.updates.config
        if config.nnodes > 1 and config.kv_cache_dir is not None:
            directory = str(Path(config.kv_cache_dir).absolute())
            message = msgspec.structs.replace(message, directory=directory)
        blocks = KvBlocks(self.steps.cache, message.block_tokens, self.steps.states)
        try:
            leads_machine = self.parallel.rank % config.ranks_here == 0
            self.tier = FollowingTier(own_part(message, blocks, self.parallel.rank, leads_machine))
        except StartupError as error:
            return Answer(refusal=str(error))
        return Answer(facts_of(self.model.weights, blocks))

    def adapt(self, message: Adapters) -> None:
        """Do what a message says of an adapter, or begin to."""
        assert self.adapters is not None
        match message:
            case ReadAdapter():
                self.begin(partial(self.adapters.do, message), self.channel.send)
            case TakeAdapter(name, number):
                self.adapters.take(name, number)
            case DropAdapter(name):
                self.adapters.take_out(name)

    @torch.inference_mode()
    def forward(self, message: Forward) -> None:
        """This rank's part of a forward pass."""
        assert self.steps is not None
        page_size = self.steps.cache.page_size
        if self.adapters is not None:
            self.adapters.expect(message.adapters, message.query_lengths)
        self.steps.forward(Plan(), inputs_of(message, page_size, self.model.hidden_size, self.device))

    @torch.inference_mode()
    def logits(self, rows: int) -> None:
        """This rank's part of the logits, of hidden states that rank 0 broadcasts."""
        hidden = torch.empty(rows, self.model.hidden_size, dtype=self.model.dtype, device=self.device)
        self.parallel.broadcast(hidden)
        self.model.logits(hidden)

    def answer_meeting(self, number: int, answer: Answer) -> None:
        """Say what came of joining or leaving a process group."""
        self.channel.send(msgspec.structs.replace(answer, meeting=number))

    # work in the background

    def begin(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        """Begin work in the background, and give `then` its result."""
        self.finish_job()
        self.job = finished(work, then)

    def work_on(self) -> None:
        """Let the work in the background run for a slice."""
        self.job = resumed(self.job)
        self.meetings = [meeting for meeting in self.meetings if resumed(meeting)]

    def finish_job(self) -> None:
        """Work on until the job is done; who waits for a trainer waits on."""
        while self.job is not None:
            self.work_on()


def resumed(work: Work | None) -> Work | None:
    """Work after one more slice; None where it has ended."""
    if work is None:
        return None
    try:
        next(work)
    except StopIteration:
        return None
    return work


def finished(work: Callable[[], Any], then: Callable[[Any], None]) -> Work:
    """Work in the background, up to its end; an error that nobody expects is an answer too."""
    try:
        result = yield from run_in_background(work)
    except CommandRefused as refusal:
        result = Answer(refusal=refusal.message, status=refusal.status)
    then(result)


if __name__ == "__main__":
    main()
