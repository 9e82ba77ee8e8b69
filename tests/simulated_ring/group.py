"""A scheduler that is several ranks: rank 0 is the process of the ring, the others follow it over virtual channels.

What they say to each other and do about it is the real code: `Followers`, `LeadingUpdates`, `LeadingPart`, `Follower`,
`FollowingUpdates`, `FollowingTier`. Weights are a label, and a forward pass writes tokens to cells. In place of sums
between the ranks, each rank reads the prefixes of a step through its own cells: all must see the same, under the same
weights.

Rank 0 waits where the real one does: in a step for all others, and in the background for their answers. Work in the
background is a thread that runs only while the loop lets it.
"""

import itertools
import threading
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Generator
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from quartet.runtime.errors import CommandRefused
from quartet.scheduler_service.core.pages import runs_of
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.execution.rank_messages import (
    DECODER,
    Answer,
    Channel,
    Forward,
    Message,
    OpenTier,
)
from quartet.scheduler_service.execution.rank_tier import FollowingTier
from quartet.scheduler_service.execution.rank_updates import FollowingUpdates, LeadingUpdates
from quartet.scheduler_service.execution.ranks import Followers
from quartet.scheduler_service.follower import Follower
from quartet.scheduler_service.host.parallel import Parallel
from quartet.scheduler_service.weights.record import Committed
from quartet.scheduler_service.weights.update import Staged, Updates
from tests.simulated_ring.clock import Agenda
from tests.simulated_ring.disks import BlockDisk, Cells, TierSettings, VirtualPart, mark_of

MOST_RANKS = 3
SHARE = 0.25  # of the runs: their schedulers are groups
MOST_TURNS = 6  # of work in the background
REFUSES = 0.1  # the share of updates that one rank refuses
REWRITTEN = 0.05  # the share of updates whose files change while the ranks read them
BROKEN = "broken"
NOTICED_S = 0.005  # until the end of a rank is noticed by itself


def ranks_of(seed: int) -> int:
    """How many ranks a scheduler of this run has."""
    random = Random(f"ranks {seed}")
    return random.randint(2, MOST_RANKS) if random.random() < SHARE else 1


class Hangs(BaseException):
    """Rank 0 waits for a rank that does not move."""


class Died(BaseException):
    """A rank ends here."""


class VirtualUpdates(Updates):
    """Weights that are a label: the name of a directory."""

    def __init__(self, weight_version: str, random: Random, refuses: float) -> None:
        self.serves = weight_version
        self.session = None
        self.groups = {}
        self.committed = Committed(model_path="", model_dir="", weight_version=weight_version)
        self._random, self._refuses = random, refuses

    def locate(self, model_path: str) -> Path:
        return Path(model_path)

    def from_disk(self, model_path: str, load_format: str, digests: Any) -> Staged:
        if model_path == BROKEN:
            raise CommandRefused("nothing was changed")
        if self._random.random() < self._refuses:
            raise CommandRefused("no room", 503)
        seen = int(self._random.random() < self._refuses * REWRITTEN / REFUSES)
        files = {"model.safetensors": [1, seen]}
        source = Committed(model_path=model_path, model_dir=model_path, weight_version="", files=files)
        return Staged(None, frozenset(), [], source)  # type: ignore[arg-type]

    def swap(self, staged: Staged, version: str) -> Any:
        assert staged.source is not None
        self.serves = staged.source.model_path
        self.committed = msgspec.structs.replace(staged.source, weight_version=version)
        return []

    def free(self, old: Any) -> None:
        """There is nothing to free."""


class VirtualLeadingUpdates(LeadingUpdates, VirtualUpdates):
    """Those of rank 0: `super()` of LeadingUpdates is VirtualUpdates."""

    def __init__(self, weight_version: str, random: Random, followers: Followers) -> None:
        VirtualUpdates.__init__(self, weight_version, random, refuses=0.0)
        self.followers = followers


class VirtualFollowingUpdates(FollowingUpdates):
    """Those of another rank, which share the thread of the tests: torch is left as it is."""

    do = FollowingUpdates.do.__wrapped__  # type: ignore[attr-defined]


class VirtualChannel(Channel):
    """One end of a channel, whose messages are encoded as over a socket."""

    def __init__(
        self, into: "deque[bytes]", out: "deque[bytes]", is_closed: Callable[[], bool], wait: Callable[[], None]
    ) -> None:
        """`is_closed`: the other end is dead. `wait` returns when something may have come."""
        self._into, self._out, self._is_closed, self._wait = into, out, is_closed, wait

    def send(self, message: Message) -> None:
        if self._is_closed():
            raise BrokenPipeError("the rank has ended")
        self._out.append(msgspec.msgpack.encode(message))

    def receive(self, most_bytes: int = 0) -> Message | None:
        while not self._into:
            if self._is_closed():
                return None
            self._wait()
        found: Message = DECODER.decode(self._into.popleft())
        return found

    def waits(self, timeout_s: float) -> bool:
        return bool(self._into) or self._is_closed()


class VirtualFollower(Follower):
    """A rank other than 0, without a model."""

    def __init__(self, group: "Group", rank: int, to: "deque[bytes]", back: "deque[bytes]") -> None:
        self.rank, self.group = rank, group
        self.channel = VirtualChannel(to, back, lambda: False, lambda: None)
        self.parallel = Parallel(rank, group.size)
        self.updates = VirtualFollowingUpdates(VirtualUpdates(group.starts_with, group.random, REFUSES))
        self.cells = Cells(group.cells.page_size, array("i", [-1]) * len(group.cells.tokens))
        self.steps = self.memory = self.adapters = self.tier = self.job = None
        self.meetings = []
        self.part: VirtualPart | None = None
        self.seen: deque[list[int]] = deque()  # by step: what it has computed with
        self.points_left: int | None = None  # until its death
        self.hung = self.dead = False

    @property
    def serves(self) -> str:
        updates = self.updates.updates
        assert isinstance(updates, VirtualUpdates)
        return updates.serves

    @property
    def at_rest(self) -> bool:
        return self.dead or self.hung or not (self.channel.waits(0) or self.job is not None)

    def turn(self) -> None:
        """As `run` has it, once. Raises Died."""
        if self.points_left is not None:
            self.points_left -= 1
            if self.points_left <= 0:
                raise Died
        if self.channel.waits(0):
            message = self.channel.receive()
            assert message is not None
            self.handle(message)
        elif self.job is not None:
            self.work_on()

    def begin(self, work: Callable[[], Any], then: Callable[[Any], None]) -> None:
        self.finish_job()
        self.job = self._beside(work, then)

    def _beside(self, work: Callable[[], Any], then: Callable[[Any], None]) -> Generator[None, bool | None, None]:
        for _ in range(self.group.random.randint(0, MOST_TURNS)):
            yield
        then(work())

    def forward(self, message: Forward) -> None:
        tokens, slots = array("q", message.input_ids), array("q", message.slots)
        mark = mark_of(self.serves)
        for token, slot in zip(tokens, slots, strict=True):
            self.cells.tokens[slot], self.cells.marks[slot] = token, mark
        pages = [[page for first, count in runs for page in range(first, first + count)] for runs in message.runs]
        self.seen.append(
            [seen(self.cells, *prefix, self.serves) for prefix in zip(pages, message.context_lengths, strict=True)]
        )

    def open_tier(self, message: OpenTier) -> Answer:
        self.part = self.group.make_part(self.rank, self.cells, lambda: self.serves)
        self.tier = FollowingTier(self.part)
        return Answer("facts")


def seen(cells: Cells, pages: list[int], length: int, weight_version: str) -> int:
    """What a rank computes a prefix with, as one number."""
    tokens, _ = cells.content(pages)
    return zlib.crc32(tokens[:length].tobytes(), mark_of(weight_version))


class Group:
    """The other ranks of one incarnation of a scheduler."""

    def __init__(
        self,
        cells: Cells,
        weight_version: str,
        tier: TierSettings | None,
        disks: list[BlockDisk],
        agenda: Agenda,
        random: Random,
        on_death: Callable[[], None],
    ) -> None:
        """`cells`: of rank 0. `disks`: by rank. `on_death`: a rank has ended, and the group will."""
        self.size, self.cells, self.starts_with = len(disks), cells, weight_version
        self.random = random
        self.errors: list[Exception] = []  # that a rank has raised
        self._tier, self._disks, self._agenda, self._on_death = tier, disks, agenda, on_death
        self._beside: Beside | None = None
        channels, self.ranks = [], list[VirtualFollower]()
        for rank in range(1, self.size):
            to, back = deque[bytes](), deque[bytes]()
            follower = VirtualFollower(self, rank, to, back)
            self.ranks.append(follower)
            channels.append(VirtualChannel(back, to, lambda rank=follower: rank.dead, self.wait))
        self.followers = Followers(Parallel(0, self.size), channels)
        self.updates = VirtualLeadingUpdates(weight_version, random, self.followers)

    def make_part(self, rank: int, cells: Cells, serves: Callable[[], str]) -> VirtualPart:
        assert self._tier is not None
        return VirtualPart(cells, self._disks[rank], self._tier.pace, self._agenda, self.random, serves)

    # turns of the other ranks

    @property
    def at_rest(self) -> bool:
        return all(rank.at_rest for rank in self.ranks)

    def turn(self) -> bool:
        """One of them does something, if there is anything to do."""
        if ready := [rank for rank in self.ranks if not rank.at_rest]:
            self._turn_of(self.random.choice(ready))
        return bool(ready)

    def _turn_of(self, rank: VirtualFollower) -> None:
        try:
            rank.turn()
        except Died:
            rank.dead = True
            self._agenda.after(self.random.uniform(0, NOTICED_S), self._on_death)
        except Exception as error:
            self.errors.append(error)
            rank.hung = True

    def wait(self) -> None:
        """Rank 0 waits for the others: in the background, or while nothing else happens. Raises Hangs."""
        if self._beside is not None and self._beside.is_current:
            self._beside.pause()
        elif not self.turn():
            raise Hangs

    # what rank 0 does with them

    def forward(self, plan: Plan, inputs: list[int], cell: Callable[..., int]) -> None:
        """Tell the others of a step. `inputs`: its tokens, slice by slice. Raises OSError."""
        slots = [cell(part.sequence, position) for part in plan.slices for position in range(part.start, part.end)]
        lengths = [part.end - part.start for part in plan.slices]
        self.followers.tell(
            Forward(
                input_ids=array("q", inputs).tobytes(),
                positions=b"",
                slots=array("q", slots).tobytes(),
                begun=b"",
                starts=list(itertools.accumulate(lengths, initial=0))[:-1],
                query_lengths=lengths,
                context_lengths=[part.end for part in plan.slices],
                runs=[list(runs_of(part.sequence.pages)) for part in plan.slices],
            )
        )

    def sum(self, plan: Plan, weight_version: str) -> None:
        """Wait for what all have seen in the step. Raises ConnectionError, and Hangs."""
        own = [seen(self.cells, part.sequence.pages, part.end, weight_version) for part in plan.slices]
        for rank in self.ranks:
            while not rank.seen:
                if rank.dead:
                    raise ConnectionError("the ranks have lost each other")
                if rank.hung:
                    raise Hangs
                self._turn_of(rank)
            found = rank.seen.popleft()
            if found != own:
                same = rank.serves == weight_version
                self.errors.append(
                    AssertionError(f"rank {rank.rank} computes with other {'KV' if same else 'weights'}")
                )

    def in_background(self, work: Callable[[], Any]) -> Generator[None, bool | None, Any]:
        """As `run_in_background` has it."""
        self._beside = beside = Beside(work)
        while not beside.done:
            beside.turn()
            yield
        self._beside = None
        if isinstance(beside.error, CommandRefused):
            raise beside.error
        if beside.error is not None:
            raise CommandRefused(f"Internal error: {beside.error}", 500)
        return beside.result

    def rename(self, weight_version: str) -> None:
        """The weights of all are others, by means that are no part of this simulation. Raises Hangs."""
        for rank in self.ranks:
            while not (rank.dead or rank.at_rest):
                self._turn_of(rank)
            if rank.hung:
                raise Hangs
            updates = rank.updates.updates
            assert isinstance(updates, VirtualUpdates)
            updates.serves = weight_version
        self.updates.serves = weight_version

    def end(self) -> None:
        """All have ended."""
        for rank in self.ranks:
            rank.dead = True
            if rank.part is not None:
                rank.part.dead = True
        if self._beside is not None:
            self._beside.abandon()


class Beside:
    """Work in a thread, which runs only within `turn`, until it pauses or ends."""

    def __init__(self, work: Callable[[], Any]) -> None:
        self.done = False
        self.result: Any = None
        self.error: BaseException | None = None
        self._work = work
        self._go, self._back = threading.Semaphore(0), threading.Semaphore(0)
        self._abandoned = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def is_current(self) -> bool:
        return threading.current_thread() is self._thread

    def turn(self) -> None:
        self._go.release()
        self._back.acquire()

    def pause(self) -> None:
        """Let the loop go on; raises Died where it never comes back."""
        if not self._abandoned:
            self._back.release()
            self._go.acquire()
        if self._abandoned:
            raise Died

    def abandon(self) -> None:
        """The process has ended."""
        if not self.done:
            self._abandoned = True
            self.turn()
            self._thread.join()

    def _run(self) -> None:
        self._go.acquire()
        try:
            if not self._abandoned:
                self.result = self._work()
        except BaseException as error:
            self.error = error
        self.done = True
        self._back.release()
