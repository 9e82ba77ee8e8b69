"""The scheduler of the ring: the real one, over a fake model, weights that are a label, and what the seed gives it.

It may be a group of ranks (`group.py`), and there may be a tier behind its KV pool (`disks.py`).
"""

import zlib
from array import array
from collections import deque
from collections.abc import Callable, Generator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import msgspec

from quartet.runtime.control import UpdateWeightsFromDisk
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply
from quartet.scheduler_service.control import weights as control_weights
from quartet.scheduler_service.control.agreement import agreed
from quartet.scheduler_service.control.context import Context
from quartet.scheduler_service.control.durable_state import DurableState
from quartet.scheduler_service.control.handlers import HANDLERS
from quartet.scheduler_service.control.runner import CommandRunner, PartialChange
from quartet.scheduler_service.core.kv_tier import KvTier
from quartet.scheduler_service.core.plan import Plan, Result, Slice
from quartet.scheduler_service.core.planner import Planner
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.execution.kv_tier import KvTierStore
from quartet.scheduler_service.execution.rank_messages import OpenTier
from quartet.scheduler_service.execution.rank_tier import LeadingPart
from quartet.scheduler_service.scheduler import Scheduler
from tests.fakes import FakeGrammars, FakeWorker, looping_token
from tests.simulated_ring.adapters import SUFFIXES, AdapterRun, VirtualStore
from tests.simulated_ring.clock import Agenda
from tests.simulated_ring.directories import FIRST_PATH, Directories
from tests.simulated_ring.disks import BLOCK_TOKENS, BlockDisk, Cells, TierSettings, VirtualPart, identity_of, mark_of
from tests.simulated_ring.faults import hold
from tests.simulated_ring.group import BROKEN, Group, Hangs
from tests.simulated_ring.memory import FAILS, VirtualSaver
from tests.simulated_ring.services import FIRST_VERSION, POISON, SCHEDULER, Killed, Process

MOST_STAGING_TURNS = 6


class Worker(FakeWorker):
    """The fake model, whose tokens depend on the weights that serve. Some prompts are too much for it."""

    def __init__(self, point: Callable[[], None], version: str, **settings: Any) -> None:
        super().__init__(model=self._token, **settings)
        self.weight_version = version
        self.cells = Cells(self.page_size, self._memory)
        self.cells.snapshots = self._snapshots
        self.group: Group | None = None  # of tensor parallel
        self.adapters: VirtualStore | None = None
        self.launches = 0
        self.directories, self.weight_files = Directories(), ""
        self._begun: set[Sequence] = set()
        self._suffix = ""  # what the adapter of the slice that is drawn adds to the label of the weights
        self._point = point

    def launch(self, plan: Plan) -> list[Result]:
        for part in plan.slices:
            if part.sequence.ids[part.sequence.prompt_len - 1] == POISON[SCHEDULER]:
                raise Killed(SCHEDULER)
        self._point()
        self.launches += 1
        self.plans.clear()
        self.forgotten.clear()
        if self.group is None:
            return self._launch(plan)
        try:
            tokens = [self._input(part, place) for part in plan.slices for place in range(part.start, part.end)]
            self.group.forward(plan, tokens, self._cell)
            results = self._launch(plan)
            self.group.sum(plan, self.weight_version)
        except OSError as error:  # as LeadingSteps.together
            raise Killed(SCHEDULER) from error
        return results

    def _launch(self, plan: Plan) -> list[Result]:
        self.directories.compute(self.weight_version, self.weight_files)
        for part in plan.slices:
            mark = mark_of(self.weight_version + self.suffix_of(part.sequence))
            self._check_prefix(part, mark)
            for position in range(part.start, part.end):
                self.cells.marks[self._cell(part.sequence, position)] = mark
            self.cells.snapshot_marks.update((number, mark) for _, number in part.saves)
        return super().launch(plan)

    def _check_prefix(self, part: Slice, mark: int) -> None:
        """What a request finds in the prefix cache must be of the weights and the adapter that it begins with."""
        if part.sequence not in self._begun:
            self._begun.add(part.sequence)
            found = {self.cells.marks[self._cell(part.sequence, position)] for position in range(part.start)}
            hold(found <= {mark}, part.sequence.rid, "begins with KV of other weights or of another adapter")

    def forget(self, sequence: Sequence) -> None:
        super().forget(sequence)
        self._begun.discard(sequence)

    def suffix_of(self, sequence: Sequence) -> str:
        """What its adapter adds to the label of the weights."""
        return "" if self.adapters is None else self.adapters.suffix_of(sequence.request.adapter)

    def _draw(self, part: Slice, prefix: "array[int]") -> list[int]:
        self._suffix = self.suffix_of(part.sequence)
        return super()._draw(part, prefix)

    def _token(self, prefix: "array[int]", vocab_size: int, seed: int) -> int:
        return drawn(prefix, seed, self.weight_version + self._suffix, vocab_size)


def drawn(prefix: "array[int]", seed: int, weight_version: str, vocab_size: int) -> int:
    """The token behind a prefix, under these weights."""
    return looping_token(prefix, vocab_size, zlib.crc32(weight_version.encode(), seed))


class State(DurableState):
    """State whose scheduler may die before or after it has saved it."""

    def __init__(self, run_dir: str, point: Callable[[], None]) -> None:
        super().__init__(run_dir)
        self._point = point

    def save(self, context: Context) -> None:
        self._point()
        super().save(context)
        self._point()


class Disk:
    """What outlasts a scheduler besides its durable state: which weights were committed last, and each rank's KV."""

    def __init__(self, run_dir: str, ranks: int, directories: Directories) -> None:
        Path(run_dir).mkdir()
        self.run_dir = run_dir
        self.directories = directories
        self.commit(FIRST_PATH, directories.files(FIRST_PATH), FIRST_VERSION)
        self.blocks = [BlockDisk() for _ in range(ranks)]

    def commit(self, model_path: str, weight_files: str, weight_version: str) -> None:
        """Record what serves."""
        self.model_path, self.weight_files, self.weight_version = model_path, weight_files, weight_version

    @property
    def version_there(self) -> str:
        """What a scheduler that starts calls the weights that it finds."""
        return self.directories.version(self.model_path, self.weight_files, self.weight_version)


class RingScheduler(Scheduler):
    """As the real one, which knows the path of its weights by what updates them."""

    model_path = weight_files = ""

    def state(self) -> dict[str, Any]:
        return {"model_path": self.model_path, "weight_files": self.weight_files, **super().state()}


class Progress:
    def beat(self, busy: bool) -> None:
        """Nobody looks."""


class SchedulerProcess(Process):
    """As `scheduler_service.assemble.serve` has it; weights are swapped by a handler without files and threads."""

    def __init__(
        self,
        config: PlannerConfig,
        depth: int,
        disk: Disk,
        agenda: Agenda,
        random: Random,
        carried_out: list[tuple[str, int, str]],
        pid: int,
        tier: TierSettings | None,
        adapters: AdapterRun | None,
        saves_memory: bool,
        on_death: Callable[["SchedulerProcess"], None],
        **place: Any,
    ) -> None:
        """`on_death`: one of its ranks has ended, and it will."""
        super().__init__(role=SCHEDULER, **place)
        self.agenda = agenda
        self.disk, self.random, self.carried_out, self.pid = disk, random, carried_out, pid
        self.worker = Worker(
            self.point,
            disk.version_there,
            page_size=config.page_size,
            page_count=config.total_pages,
            max_running_requests=config.max_running,
            vocab_size=config.vocab_size,
        )
        self.parts: list[VirtualPart] = []  # of the tier, by rank
        self.found = 0  # blocks of the tier at its start
        self._updates: deque[str] = deque()  # ids of updates, in order; the first one runs
        self.group: Group | None = None
        if len(disk.blocks) > 1:
            self.group = Group(
                self.worker.cells, disk.weight_version, tier, disk.blocks, agenda, random, lambda: on_death(self)
            )
        self.worker.group, self.worker.directories = self.group, disk.directories
        self.worker.recurrent = config.snapshots is not None
        self.adapters = self.worker.adapters = adapters and VirtualStore(
            adapters, disk.run_dir, self.schedulers, self.rank, random, self.point
        )
        self.saver = VirtualSaver(self.worker.cells, random) if saves_memory else None
        planner = Planner(config)
        self.tier = None if tier is None else self._make_tier(planner, tier)
        if adapters is not None:
            for part in self.parts:
                part.suffixes = SUFFIXES
        for part in self.parts:
            part.saver = self.saver
        self._held_up = self._queue_waits = False
        durable_state = State(disk.run_dir, self.point)
        facts = msgspec.structs.replace(self.worker.facts(), epoch=self.epoch, rank=self.rank, pid=pid)
        self.scheduler = RingScheduler(
            planner,
            self.worker,
            self,
            self,
            Progress(),  # type: ignore[arg-type]
            facts=facts,
            depth=depth,
            durable_state=durable_state,
            grammars=FakeGrammars(),  # type: ignore[arg-type]
            announced=self.announced,
            tier=self.tier,
            adapters=self.adapters,
            saver=self.saver,  # type: ignore[arg-type]
            clock=lambda: agenda.now,
        )
        self.serve_from(disk.model_path, disk.directories.files(disk.model_path))
        self.scheduler.commands = CommandRunner({**HANDLERS, UpdateWeightsFromDisk: self.update_weights})
        durable_state.restore(self.scheduler)
        if self.saver is not None:
            self.saver.fails = FAILS

    def serve_from(self, model_path: str, weight_files: str) -> None:
        """The weights that serve are these."""
        self.scheduler.model_path = model_path
        self.scheduler.weight_files = self.worker.weight_files = weight_files

    def _make_tier(self, planner: Planner, settings: TierSettings) -> KvTierStore:
        """As `execution.kv_tier.tier_store`."""
        group, sizes, worker = self.group, settings.sizes, self.worker
        own = VirtualPart(
            worker.cells,
            self.disk.blocks[0],
            settings.pace,
            self.agenda,
            self.random,
            lambda: self.worker.weight_version,
        )
        part: VirtualPart | LeadingPart = own
        self.parts.append(own)
        if group is not None:
            part = LeadingPart(own, group.followers)
            part.begin(OpenTier(BLOCK_TOKENS, sizes.memory_blocks, sizes.most_fetched, len(group.ranks) + 1, ""))
            self.parts += [rank.part for rank in group.ranks if rank.part is not None]
        identity = identity_of(worker.weight_version)
        known = part.open(identity)
        self.found = len(known)
        tier = KvTier(worker.page_size, sizes)
        adapters = f"{self.key} {self.epoch}".encode()
        return KvTierStore(planner, tier, part, identity, adapters, known, lambda: self.worker.weight_version)

    @property
    def at_rest(self) -> bool:
        scheduler = self.scheduler
        if not super().at_rest or scheduler.commands or scheduler.grammar_queue or self._tier_has_news:
            return False
        if scheduler.adapter_queue and not self._queue_waits:
            return False
        return (scheduler.idle or self._held_up) and (self.group is None or self.group.at_rest)

    @property
    def _tier_has_news(self) -> bool:
        if self.tier is None:
            return False
        waiting = self.tier._outstanding.values()
        late = any(self.agenda.now >= one.until and not one.fetch.given_up for one in waiting)
        reports = self.group is not None and any(c.waits(0) for c in self.group.followers.channels)
        return late or reports or bool(self.tier.tier.commands) or any(part.ready for part in self.parts)

    @property
    def doomed(self) -> bool:
        ranks = self.group.ranks if self.group is not None else ()
        return super().doomed or any(r.points_left is not None or r.hung or r.dead for r in ranks)

    def end(self) -> None:
        for part in self.parts:
            part.dead = True
        if self.group is not None:
            self.group.end()

    def introduce(self) -> None:
        self.scheduler.emit(self.scheduler.introduce())

    def turn(self) -> bool:
        """See Process.turn: of rank 0 or of another one. Raises what a rank has raised."""
        group = self.group
        if group is None:
            return self._own_turn()
        moved = group.turn() if self.random.random() < 0.5 else self._own_turn()
        if group.errors:
            raise group.errors[0]
        return moved or group.turn() or self._own_turn()

    def _own_turn(self) -> bool:
        if self.hung:
            return False
        try:
            return super().turn()
        except Hangs:
            self.hung = True
            return True
        except (OSError, PartialChange) as error:  # a rank has ended
            raise Killed(SCHEDULER) from error

    def work(self) -> bool:
        if self.at_rest:
            return False
        before, queue, live = self.worker.launches, self.scheduler.adapter_queue, self.scheduler.planner.live
        there = len(queue), len(live)
        self.scheduler.step()
        same = self.worker.launches == before and not self.scheduler.launched
        was_read = queue._reading is not None and queue._reading.found is not None
        self._queue_waits = same and was_read and there == (len(queue), len(live))
        self._held_up = same and self.tier is not None and self.tier.holds_up
        return True

    def update_weights(
        self, scheduler: Scheduler, command: UpdateWeightsFromDisk
    ) -> Generator[None, bool | None, list[Message]]:
        """What `control_weights.from_disk` does, without weights: staged beside the loop, swapped, then recorded."""
        self._updates.append(command.id)
        try:
            while self.group is not None and self._updates[0] != command.id:
                yield
            return (yield from self._update_weights(scheduler, command))
        finally:
            self._updates.remove(command.id)

    def _update_weights(
        self, scheduler: Scheduler, command: UpdateWeightsFromDisk
    ) -> Generator[None, bool | None, list[Message]]:
        if self.saver is not None and self.saver.holds_weights:
            raise CommandRefused(control_weights.RELEASED)
        yield from self._beside()
        control_weights.refuse_unless_expected(scheduler, command)
        staged = None
        if self.group is not None:
            path = BROKEN if command.model_path == BROKEN else command.weight_version or self.worker.weight_version
            staged = yield from self.group.in_background(partial(self.group.updates.from_disk, path, "auto", None))
        elif command.model_path == BROKEN:
            raise CommandRefused("nothing was changed")
        read = self.disk.directories.files(command.model_path)
        try:
            control_weights.refuse_other_files(command, read)
            of_all = yield from agreed(scheduler, command, read)
        except CommandRefused:
            if self.group is not None:
                self.group.updates.drop_staged()
            raise
        if command.abort_all_requests:
            scheduler.emit(control_weights.abort_all(scheduler))
        if command.retract:
            scheduler.planner.retract_all()
            scheduler.forget_released()
        version = of_all or command.weight_version or self.worker.weight_version
        if self.group is not None:
            self.group.updates.swap(staged, version)
        self.carried_out.append((self.key, self.epoch, command.id))
        self.worker.weight_version = version
        self.serve_from(command.model_path, read)
        scheduler.planner.paused = scheduler.planner.paused or command.keep_pause
        scheduler.planner.forget_prefixes(free=command.flush_cache)
        yield from self._beside()
        self.point()
        self.disk.commit(command.model_path, read, self.worker.weight_version)
        self.point()
        return [Reply(id=command.id)]

    def _beside(self) -> Generator[None, bool | None, None]:
        for _ in range(self.random.randint(1, MOST_STAGING_TURNS)):
            yield
