"""The LoRA adapters of this server: which are known, which are in memory, and which version each has.

    read(...)      in the background: an adapter, checked and packed
    install(...)   between two steps: serve it from now on, in place of its predecessor of the same name
    bring_back(...) an evicted one is in memory again, before the requests that name it are queued (adapter_queue.py)

A version is a number that no other content of any adapter has had, in this run of the server. What is known is kept in
the run directory, so that a restarted scheduler serves the same adapters.
"""

import itertools
import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch

from quartet.kernels.cpu import adapters as products
from quartet.kernels.cpu.linear import Linear
from quartet.runtime import records
from quartet.runtime.adapters import Adapter, LoadAdapterFromDistributed
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.scheduler_service.core.plan import Plan
from quartet.scheduler_service.host.background import READING_SLICE_S, run_in_background, yield_point
from quartet.scheduler_service.model.batch import ServedModel
from quartet.scheduler_service.model.cpu_backend import CpuBackend
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.model.deterministic import is_asked_for
from quartet.scheduler_service.model.torch_backend import TorchBackend
from quartet.scheduler_service.weights.adapters import AdapterTensors, adapter_identity, check_announced, read_adapter
from quartet.scheduler_service.weights.distributed import Groups, receive_adapter
from quartet.scheduler_service.weights.file_identity import FileIdentity

log = logging.getLogger(__name__)

Result = TypeVar("Result")

RECORD = "adapters.json"
NOT_ON_THIS_MODEL = (
    "--enable-lora needs a generating model of a native family, with plain attention (on a GPU one that runs on the "
    "fused operations), and {} is none"
)
FULL = "{} adapters are in memory, all pinned or in use; --max-loaded-loras allows no more"
TOO_MANY_PINNED = "{} adapters are pinned, and --max-loaded-loras allows {}"


class Known(msgspec.Struct, kw_only=True):
    """An adapter that requests may name."""

    name: str
    path: str  # as given
    directory: str
    version: str
    rank: int
    pinned: bool
    owned: bool = False  # the directory was made for it, from tensors that a client has sent
    identity: FileIdentity  # of the file that its weights are from


class Saved(msgspec.Struct, kw_only=True):
    """What a restarted scheduler has to know."""

    adapters: list[Known]
    versions: int  # given so far
    ending: list[str] = []  # names of those that go with the last of the requests that use them


@dataclass(frozen=True, slots=True)
class Read:
    """An adapter in memory that is not served yet."""

    rank: int
    identity: FileIdentity
    weights: Any  # as `AdapterStore.pack` has made them


class AdapterStore(ABC):
    """All adapters of one scheduler."""

    def __init__(self, model: Decoder, config: ResolvedConfig, run_dir: str) -> None:
        self.config = config
        self.run_dir = run_dir
        self.layout = model.weights.layout
        self.dtype = model.dtype
        self.known: dict[str, Known] = {}
        self.loaded: dict[str, Any] = {}  # what `pack` has made; least recently used first
        self.leaving: set[str] = set()  # take no more requests
        self.ending: set[str] = set()  # those of them whose unloading was answered; requests may use them
        self.versions = 0
        self.version_of: dict[str, str] = {}  # replaced as a whole at each change: plans keep the one of their launch

    # At the start

    def start(self) -> None:
        """Load the adapters of --lora-paths, or those that the previous scheduler served. Raises StartupError."""
        saved = records.read_record(self.run_dir, RECORD, Saved)
        if saved is None:
            for source in self.config.adapters:
                self.start_with(source.lora_name, source.lora_path, source.directory, source.pinned)
            self.check_pinned()
            return
        self.versions = saved.versions
        self.ending |= set(saved.ending)
        self.leaving |= self.ending
        self.known |= {known.name: known for known in saved.adapters}
        for known in sorted(saved.adapters, key=lambda known: not self.stays(known.name)):  # who stays needs its place
            try:
                self.restore(known)
            except (StartupError, OSError) as error:
                log.error("The adapter %s cannot be read now: %s", known.name, error)
        self.tell()

    def start_with(self, name: str, path: str, directory: str, pinned: bool) -> None:
        read = self.read(Path(directory))
        self.install(name, path, directory, read, pinned)
        if not self.has_room(0):
            self.evict(name if not pinned else self.victim(()) or name)

    def restore(self, known: Known) -> None:
        """Know an adapter again, under a new version where its file has changed."""
        identity = adapter_identity(Path(known.directory))
        if identity != known.identity:
            known = msgspec.structs.replace(known, identity=identity, version=self.next_version())
        if self.stays(known.name) or self.has_room():
            self.put(known.name, self.read(Path(known.directory)))
        self.known[known.name] = known

    def check_pinned(self) -> None:
        pinned, most = sum(known.pinned for known in self.known.values()), self.config.max_loaded_loras
        if most is not None and pinned > most:
            raise StartupError(TOO_MANY_PINNED.format(pinned, most))

    # Loading

    def read(self, directory: Path) -> Read:
        """The adapter of a directory, ready to compute; safe in another thread. Raises CheckpointError."""
        identity = adapter_identity(directory)
        config = self.config
        with torch.inference_mode(), one_thread():
            tensors = read_adapter(directory, self.layout, self.dtype, config.max_lora_rank, config.lora_target_modules)
            return Read(tensors.rank, identity, self.pack(tensors))

    def in_background(self, work: Callable[[], Result]) -> Generator[None, bool | None, Result]:
        """Read in the background: see `run_in_background`."""
        return run_in_background(work, READING_SLICE_S)

    @abstractmethod
    def pack(self, tensors: AdapterTensors) -> Any:
        """An adapter as steps take it; safe in another thread. Raises CheckpointError."""

    def receive(self, groups: Groups, command: LoadAdapterFromDistributed) -> list[tuple[str, torch.Tensor]]:
        """The tensors of an adapter that a trainer broadcasts; safe in another thread. Raises CheckpointError.

        What cannot be an adapter of this model is refused before anything is received.
        """
        self.check_announced(command)
        return receive_adapter(groups, command)

    def check_announced(self, command: LoadAdapterFromDistributed) -> None:
        """Raise CheckpointError for tensors that are not those of an adapter of this model."""
        check_announced(command.names, command.shapes, self.layout, self.config.max_lora_rank)

    def install(self, name: str, path: str, directory: str, read: Read, pinned: bool, owned: bool = False) -> None:
        """Serve an adapter from the next step on, in place of its predecessor; between two steps only."""
        before = self.known.get(name)
        self.known[name] = Known(
            name=name,
            path=path,
            directory=directory,
            version=self.next_version(),
            rank=read.rank,
            pinned=pinned,
            owned=owned,
            identity=read.identity,
        )
        self.stay(name)
        self.take_out(name)
        self.put(name, read)
        self.tell()
        remove_owned(before)

    def is_served(self, name: str) -> bool:
        """Whether new requests may name an adapter."""
        return name in self.known and name not in self.leaving

    def use(self, name: str) -> bool:
        """Whether an adapter is in memory; if so, it was used now."""
        if name not in self.loaded:
            return False
        self.loaded[name] = self.loaded.pop(name)
        return True

    def read_known(self, known: Known) -> Read:
        """An adapter that was evicted; safe in another thread. Raises CheckpointError."""
        return self.read(Path(known.directory))

    def bring_back(self, known: Known, read: Read) -> None:
        """Have an evicted adapter in memory again, under a new version where its file has changed."""
        if read.identity != known.identity:
            known.version, known.identity, known.rank = self.next_version(), read.identity, read.rank
        self.put(known.name, read)
        self.tell()

    def has_room(self, more: int = 1) -> bool:
        most = self.config.max_loaded_loras
        return most is None or len(self.loaded) + more <= most

    def make_room(self, in_use: Collection[str]) -> None:
        """Evict the adapter that was not used for longest, if memory for one more needs it. Raises CommandRefused."""
        if not self.has_room() and not self.evict_unused(in_use):
            raise CommandRefused(FULL.format(len(self.loaded)))

    def evict_unused(self, in_use: Collection[str]) -> bool:
        """Evict the adapter that was not used for longest; False where all are pinned or in use."""
        victim = self.victim(in_use)
        if victim is not None:
            self.evict(victim)
        return victim is not None

    def victim(self, in_use: Collection[str]) -> str | None:
        """The adapter to evict, one that ends before others; None where all are pinned or in use."""
        unused = [name for name in self.loaded if name not in in_use and not self.stays(name)]
        return min(unused, key=lambda name: name not in self.ending, default=None)

    def stays(self, name: str) -> bool:
        """Whether an adapter never leaves memory for another: it is pinned, and not unloaded."""
        return self.known[name].pinned and name not in self.ending

    @property
    def all_pinned(self) -> bool:
        """Whether no adapter in memory will ever leave it for another."""
        return all(map(self.stays, self.loaded))

    def evict(self, name: str) -> None:
        self.take_out(name)
        log.info("evicted the adapter %s", name)

    def put(self, name: str, read: Read) -> None:
        """Have an adapter in memory."""
        self.loaded[name] = read.weights

    def take_out(self, name: str) -> None:
        """Free the memory of an adapter, if it is there."""
        self.loaded.pop(name, None)

    def forget(self, name: str) -> None:
        """Unload an adapter that no request uses any more."""
        self.stay(name)
        self.take_out(name)
        known = self.known.pop(name)
        self.tell()
        remove_owned(known)

    def leave(self, name: str) -> None:
        """Take no more requests for an adapter. Beside other schedulers, which may have forgotten it, a restarted one
        takes none either, and has it for those that come again.
        """
        self.leaving.add(name)
        if self.config.dp_size > 1:
            self.tell()

    def end_later(self, name: str) -> None:
        """Have an adapter that leaves be forgotten when no request needs it, also by a restarted scheduler."""
        self.ending.add(name)
        self.tell()

    def stay(self, name: str) -> None:
        """Forget that an adapter was to be unloaded."""
        self.leaving.discard(name)
        self.ending.discard(name)

    def next_version(self) -> str:
        self.versions += 1
        return str(self.versions)

    def tell(self) -> None:
        """Note a change: for the next plans, and for a restarted scheduler."""
        self.version_of = {known.name: known.version for known in self.known.values()}
        try:
            ending = self.ending | self.leaving if self.config.dp_size > 1 else self.ending
            saved = Saved(adapters=list(self.known.values()), versions=self.versions, ending=sorted(ending))
            records.write(self.run_dir, RECORD, saved)
        except OSError as error:
            log.error("Could not record the adapters: %s. A restarted scheduler would not know them all.", error)

    def state(self) -> list[dict[str, Any]]:
        """Facts.state["adapters"]: all that requests may name."""
        served = [known for known in self.known.values() if self.is_served(known.name)]
        return [
            msgspec.to_builtins(
                Adapter(
                    name=known.name,
                    path=known.path,
                    version=known.version,
                    rank=known.rank,
                    pinned=known.pinned,
                    loaded=known.name in self.loaded,
                )
            )
            for known in served
        ]

    def new_directory(self) -> Path:
        """An empty directory for tensors that a client has sent."""
        for number in itertools.count(self.versions + 1):
            path = Path(self.run_dir) / "adapters" / str(number)
            try:
                path.mkdir(parents=True)
            except FileExistsError:
                continue
            return path
        raise AssertionError


class CpuAdapters(AdapterStore):
    """The adapters of a model that is computed on a CPU."""

    def __init__(self, model: Decoder, config: ResolvedConfig, run_dir: str) -> None:
        super().__init__(model, config, run_dir)
        self.step = products.attach(linears_of(model), is_asked_for(config, model.device))
        assert isinstance(model.backend, CpuBackend | TorchBackend), model.backend
        model.backend.watch_rows(self.step.select)

    def pack(self, tensors: AdapterTensors) -> products.AdapterWeights:
        """See AdapterStore.pack."""
        factors = {slab: [(one.start, one.a, one.b) for one in its] for slab, its in tensors.slabs.items()}
        return self.step.weights(factors, yield_point)

    def uses(self, plan: Plan) -> bool:
        """Whether a step has rows with adapters."""
        return any(share.sequence.request.adapter for share in plan.slices)

    def of_step(self, plan: Plan) -> AbstractContextManager[None]:
        """Within it the model adds what the adapters of the plan's requests have for their tokens."""
        return self.of_slices(named_by(plan), [share.end - share.start for share in plan.slices])

    def of_slices(self, named: Sequence[str], counts: Sequence[int]) -> AbstractContextManager[None]:
        """The same of slices with these adapters ("": none) and so many tokens."""
        numbers = {name: i for i, name in enumerate(sorted({name for name in named if name}))}
        owners = torch.tensor([numbers.get(name, -1) for name in named])
        rows = owners.repeat_interleave(torch.tensor(counts))
        return self.step.of_step([self.loaded[name] for name in numbers], rows)


def named_by(plan: Plan) -> list[str]:
    """The adapter of each slice; "": none."""
    return [share.sequence.request.adapter for share in plan.slices]


@contextmanager
def one_thread() -> Iterator[None]:
    """Within it torch computes on the calling thread alone: steps need the other cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # of this thread only
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def linears_of(model: Decoder) -> list[tuple[Any, str, tuple[int, ...]]]:
    """The layers that may have adapters, and the names of their weights."""
    return [follower for follower in model.weights.followers if isinstance(follower[0], Linear)]


def remove_owned(known: Known | None) -> None:
    """Remove the directory that was made for an adapter."""
    if known is not None and known.owned:
        shutil.rmtree(known.directory, ignore_errors=True)


Store = TypeVar("Store", bound=AdapterStore)


def adapter_store(
    model: ServedModel,
    architecture: str,
    config: ResolvedConfig,
    run_dir: str,
    make: Callable[[Decoder, ResolvedConfig, str], Store],
) -> Store:
    """The adapters of a server that takes some, loaded. Raises StartupError."""
    if not isinstance(model, Decoder) or not model.spec.generates or model.spec.is_recurrent or model.spec.latent:
        raise StartupError(NOT_ON_THIS_MODEL.format(architecture))
    store = make(model, config, run_dir)
    store.start()
    return store
