"""A tier without memory and disk: dictionaries that do what its books say, as late and as badly as a draw decides."""

import random
from array import array
from collections import deque
from collections.abc import Callable

from quartet.scheduler_service.core.kv_tier import Fetch, Forget, KvTier, TierSizes
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.core.tier_acts import DropFile, DropMemory, Store
from tests.stepper import Stepper


def sizes(**changes: int) -> TierSizes:
    """Small ones: blocks of 8 tokens."""
    settings = {
        "block_tokens": 8,
        "block_bytes": 100,
        "memory_blocks": 0,
        "file_blocks": 100,
        "most_pending": 100,
        "most_fetched": 100,
    }
    return TierSizes(**(settings | changes))


class FakeStore:
    """Copies the fake worker's memory. Without a draw all is done at once, and well."""

    def __init__(self, stepper: Stepper, sizes: TierSizes, draw: random.Random | None = None) -> None:
        self.stepper = stepper
        self.tier = KvTier(stepper.planner.config.page_size, sizes)
        stepper.planner.pool.tier = self.tier
        self.draw = draw
        self.memory: dict[bytes, array[int]] = {}
        self.files: dict[bytes, array[int]] = {}
        self.spoilt: set[bytes] = set()  # files that cannot be read until they are written again
        self.jobs: deque[Callable[[], None]] = deque()  # of the writer, in order
        self.reads: list[Fetch] = []
        self.identity = b"first"
        self.tier.open(self.identity, b"these adapters")
        self._next, stepper.planner.next = stepper.planner.next, self.plan  # type: ignore[method-assign]

    def plan(self, now: float) -> Plan | None:
        """As KvTierStore.plan, behind a turn."""
        plan = self._next(now)
        self.carry_out_all()
        return plan

    def turn(self) -> None:
        """One turn of the loop: all commands are carried out, and some jobs end."""
        self.carry_out_all()
        for _ in range(len(self.jobs) if self.draw is None else self.draw.randrange(4)):
            if self.jobs:
                self.jobs.popleft()()
        for fetch in self.reads[:] if self.draw is None or self.draw.random() < 0.5 else []:
            self.reads.remove(fetch)
            self.read(fetch)
        self.carry_out_all()
        if self.draw is None and (self.jobs or self.reads):
            self.turn()

    def carry_out_all(self) -> None:
        while self.tier.commands:
            commands, self.tier.commands = self.tier.commands, []
            for command in sorted(commands, key=lambda command: isinstance(command, Fetch)):
                self.carry_out(command)

    def carry_out(self, command: object) -> None:
        match command:
            case Store():
                content = array("i", (token for page in command.pages for token in self.page(page)))
                if command.snapshot >= 0:
                    content = pieces_of(self.stepper.worker._snapshots[command.snapshot])[command.piece]
                if command.memory:
                    self.memory[command.key] = content
                if command.file:
                    self.jobs.append(lambda: self.write(command, content))
            case DropMemory(key):
                self.memory.pop(key, None)
            case DropFile(key):
                self.jobs.append(lambda: self.files.pop(key, None))
            case Forget():
                self.memory.clear()
                self.jobs.append(self.files.clear)
                self.tier.open(self.identity, b"these adapters")
            case Fetch() if command.files:
                self.reads.append(command)
            case Fetch():
                self.restore(command, {})

    def page(self, page: int) -> "array[int]":
        size = self.stepper.planner.config.page_size
        return self.stepper.worker._memory[page * size : (page + 1) * size]

    def write(self, command: Store, content: "array[int]") -> None:
        ok = self.draw is None or self.draw.random() < 0.9
        if ok:
            self.files[command.key] = content
            self.spoilt.discard(command.key)
        self.tier.written(command.key, command.serial, ok)

    def read(self, fetch: Fetch) -> None:
        found: dict[bytes, array[int]] = {}
        damaged = None
        for key in fetch.keys:
            if key in fetch.files:
                if key not in self.files or key in self.spoilt or (self.draw is not None and self.draw.random() < 0.1):
                    damaged = key
                    break
                found[key] = self.files[key]
        self.restore(fetch, found, damaged)

    def restore(self, fetch: Fetch, found: "dict[bytes, array[int]]", damaged: bytes | None = None) -> None:
        blocks = []
        for key in fetch.keys:
            block = found.get(key, self.memory.get(key))
            if block is None:
                break
            blocks.append(block)
        wanted = self.tier.arrived(fetch.number, len(blocks), damaged)
        if wanted is None:
            return
        restored = self.stepper.planner.pool.restore(wanted, min(len(blocks), fetch.blocks))
        if restored.snapshot >= 0:
            state = array("i", (token for piece in blocks[fetch.blocks :] for token in piece))
            self.stepper.worker._snapshots[restored.snapshot] = state
            blocks = blocks[: fetch.blocks]
        size = self.stepper.planner.config.page_size
        content = array("i", (token for block in blocks for token in block))[restored.skipped * size :]
        for place, page in enumerate(restored.pages):
            self.stepper.worker._memory[page * size : (page + 1) * size] = content[place * size : (place + 1) * size]
        for key, block in found.items():
            if self.tier.keep(key):
                self.carry_out_all()
                self.memory[key] = block

    def check(self) -> None:
        """The books say what there is."""
        self.tier.check()
        if not self.tier.commands:
            assert len(self.memory) == len(self.tier.memory) and all(key in self.tier.memory for key in self.memory)
            if not self.jobs:
                assert len(self.files) == len(self.tier.files) and all(key in self.tier.files for key in self.files)


def pieces_of(state: "array[int]") -> "list[array[int]]":
    """The fake worker's state is the tokens that it has seen; in two pieces."""
    return [state[: len(state) // 2], state[len(state) // 2 :]]


def serve(stepper: Stepper, store: FakeStore, most_turns: int = 5000) -> None:
    """Until nothing is left to do."""
    for _ in range(most_turns):
        store.turn()
        store.check()
        if stepper.planner.idle:
            break
        stepper.step()
    assert stepper.planner.idle and stepper.planner.audit() == ""
