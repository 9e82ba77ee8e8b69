"""LoRA adapters of the ring: the real store, queue and commands, over files whose content is a label.

The tokens of a request are a function of that label too. So a request that is computed with another adapter than it
names, with one that was replaced before it came, or with KV of another one, is noticed.
"""

from collections.abc import Callable, Generator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, Any

import msgspec

from quartet.runtime.adapter_sources import AdapterSource
from quartet.runtime.adapters import LoadAdapter, UnloadAdapter
from quartet.runtime.control import COMMAND_LOST, ControlCommand
from quartet.runtime.messages import Generate, Reply, Text
from quartet.scheduler_service.execution.adapters import AdapterStore, Read
from quartet.scheduler_service.weights.adapters import SAFETENSORS, AdapterTensors, adapter_identity
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from tests.configs import resolved
from tests.simulated_ring.faults import hold
from tests.simulated_ring.load import Call, Order, is_done

if TYPE_CHECKING:
    from tests.simulated_ring.scheduler import SchedulerProcess
    from tests.simulated_ring.simulation import Simulation

SHARE = 0.45  # of the runs with one rank: their schedulers take adapters
NAMES = ("red", "green", "blue")
FILES = ("one", "two", "three", "four")
BROKEN = "broken"
SUFFIXES = ("", *(f"/{name}" for name in FILES))  # of the label of the weights
MOST_TURNS = 6  # of reading a file
PARTLY = "(scheduler DP"  # another one has done it
CONFIG = resolved(model_path="model")

Background = Generator[None, bool | None, Any]
Labels = dict[tuple[int, str], tuple[str, str]]  # (rank of the scheduler, version) → name and content


@dataclass
class AdapterRun:
    """The adapters of all schedulers of a run."""

    first: int  # so many of NAMES are there at the start, from the first of FILES
    most_loaded: int | None
    most_in_batch: int
    fails: float  # the share of files that cannot be read

    place: Path = Path()  # the directory of all files
    labels: Labels = field(default_factory=dict)  # all that were computed with

    def write_files(self, run_dir: str) -> None:
        """A directory for each of FILES, whose label is its name; one more has no weights."""
        self.place = Path(run_dir) / "files"
        for name in (*FILES, BROKEN):
            directory = self.place / name
            directory.mkdir(parents=True)
            (directory / "adapter_config.json").write_text("{}")
            if name != BROKEN:
                (directory / SAFETENSORS).write_text(name)

    def at_start(self) -> dict[str, str]:
        """Name → path."""
        return {name: str(self.place / file) for name, file in zip(NAMES[: self.first], FILES, strict=False)}


def adapters_of(seed: int, always: bool = False) -> AdapterRun | None:
    """Whether a run has adapters, and which."""
    random = Random(f"adapters {seed}")
    if random.random() >= SHARE and not always:
        return None
    return AdapterRun(
        random.randint(0, len(NAMES)),
        random.choice([None, 1, 1, 2]),
        random.choice([1, 2, 8]),
        random.choice([0.0, 0.0, 0.1]),
    )


class VirtualStore(AdapterStore):
    """The adapters of one scheduler; what a file holds is read, after some turns."""

    def __init__(
        self, of: AdapterRun, run_dir: str, schedulers: int, rank: int, random: Random, point: Callable[[], None]
    ) -> None:
        """`run_dir`: that of the scheduler's records."""
        sources = [
            AdapterSource(lora_name=name, lora_path=path, directory=path) for name, path in of.at_start().items()
        ]
        self.config = msgspec.structs.replace(
            CONFIG, dp_size=schedulers, max_loaded_loras=of.most_loaded, adapters=sources, enable_lora=True
        )
        self.run_dir = run_dir
        self.known, self.loaded = {}, {}
        self.leaving, self.ending = set(), set()
        self.versions, self.version_of = 0, {}
        self._rank, self._random, self._labels = rank, random, of.labels
        self._point: Callable[[], None] = lambda: None
        self._fails = 0.0
        self.start()
        self._fails, self._point = of.fails, point

    def read(self, directory: Path) -> Read:
        identity = adapter_identity(directory)
        if self._random.random() < self._fails:
            raise CheckpointError("the disk fails")
        return Read(1, identity, (directory / SAFETENSORS).read_text())

    def pack(self, tensors: AdapterTensors) -> Any:
        raise AssertionError("there are no tensors")

    def in_background(self, work: Callable[[], Any]) -> Background:
        for _ in range(self._random.randint(0, MOST_TURNS)):
            yield
        return work()

    def tell(self) -> None:
        self._point()
        super().tell()
        self._point()

    def suffix_of(self, name: str) -> str:
        """What an adapter adds to the label of the weights. Its version is one that nothing else has, nor has had."""
        if not name:
            return ""
        own = name, self.loaded[name]
        version = self.version_of[name]
        found = self._labels.setdefault((self._rank, version), own)
        assert found == own, f"version {version} is {found} and {own}"
        return f"/{own[1]}"


# what is drawn


def name_adapters(batch: list[Generate], served: list[str], random: Random) -> None:
    """Have some requests name one of the adapters that the gateway knows."""
    for generate in batch:
        if served and generate.request.task == "generate" and random.random() < 0.7:
            generate.request.adapter = random.choice(served)


def draw_command(adapters: AdapterRun, random: Random) -> ControlCommand:
    """What an operator does with adapters."""
    name = random.choice(NAMES)
    if random.random() < 0.4:
        return UnloadAdapter(lora_name=name)
    path = str(adapters.place / random.choice([*FILES, BROKEN]))
    return LoadAdapter(lora_name=name, lora_path=path, load_inplace=random.random() < 0.7)


# checks


def check_text(simulation: "Simulation", call: Call, generate: Generate, text: Text) -> str:
    """What the adapter adds to the label of the weights that have made these tokens; it must be the right one."""
    name, tokens = generate.request.adapter, text.tokens
    if not name:
        hold(not tokens.adapter_version, generate.request.rid, "names no adapter and has one")
    if not (name and tokens.ids):
        return ""
    assert simulation.adapters is not None
    found = simulation.adapters.labels.get((tokens.rank, tokens.adapter_version))
    hold(found is not None, generate.request.rid, "has a version that nobody gave:", tokens.adapter_version)
    assert found is not None
    hold(found[0] == name, generate.request.rid, "names", name, "and is computed with", found[0])
    right = contents(simulation.adapters, simulation.operator.orders, name, call)
    hold(found[1] in right, generate.request.rid, "is computed with", found[1], "for", sorted(right))
    return f"/{found[1]}"


def contents(adapters: AdapterRun, orders: list[Order], name: str, call: Call) -> set[str]:
    """What an adapter may have been while a call was under way."""
    right = {Path(path).name for known, path in adapters.at_start().items() if known == name}
    for order in orders:
        command = order.command
        if not isinstance(command, LoadAdapter) or command.lora_name != name:
            continue
        if is_done(order) and order.answered < call.opened:
            right = set()
        if not is_refused(order):
            right.add(Path(command.lora_path).name)
    return right


def is_refused(order: Order) -> bool:
    """Whether a command was carried out by nobody, for sure."""
    answer = order.answer
    if not isinstance(answer, Reply) or answer.success:
        return False
    return answer.message != COMMAND_LOST and PARTLY not in answer.message


def may_be_unloaded(simulation: "Simulation", name: str, call: Call) -> bool:
    """Whether a request may have come behind the end of its adapter, though its client knew of it."""
    unloads = [order for order in simulation.operator.orders if isinstance(order.command, UnloadAdapter)]
    own = [order for order in unloads if order.command.lora_name == name and not is_refused(order)]
    return any(order.answered > call.opened or not is_done(order) for order in own)  # one that was lost may go on


def check_adapters(simulation: "Simulation", processes: "list[SchedulerProcess]") -> None:
    """All schedulers and the gateway know the same adapters, and those that commands have left."""
    if simulation.adapters is None:
        return
    known = {adapter.name: adapter.path for adapter in simulation.processes["gateway"].gateway.adapters}
    for process in processes:
        store = process.adapters
        assert store is not None
        hold(not process.scheduler.adapter_queue, process.key, "has requests that wait for adapters")
        process.scheduler.adapter_queue.take_ready()  # as at the next turn of its loop, which is at rest here
        hold(not (store.ending or store.leaving), process.key, "has adapters that never end:", store.leaving)
        own = {one.name: one.path for one in store.known.values()}
        hold(own == known, process.key, "knows", own, "and the gateway", known)
        most = store.config.max_loaded_loras
        hold(most is None or len(store.loaded) <= most, process.key, "has", list(store.loaded), "in memory")
        hold(set(store.loaded) <= set(own), process.key, "has", list(store.loaded), "of", list(own))
    for name, path in expected(simulation.adapters, simulation.operator.orders).items():
        hold(known.get(name) == path, name, "is", known.get(name), "and should be", path)


def expected(adapters: AdapterRun, orders: list[Order]) -> dict[str, str | None]:
    """The path of each adapter that is known for sure; None: there is no such adapter."""
    state: dict[str, str | None] = dict.fromkeys(NAMES) | adapters.at_start()
    for order in orders:
        command = order.command
        if not isinstance(command, LoadAdapter | UnloadAdapter) or is_refused(order):
            continue
        state.pop(command.lora_name, None)
        if is_done(order):
            state[command.lora_name] = command.lora_path if isinstance(command, LoadAdapter) else None
    return state
