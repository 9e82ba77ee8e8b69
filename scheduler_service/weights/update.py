"""Weights that change while they serve: stage → check → swap.

`Updates` holds the second set of buffers and what belongs to a change that is under way. Its methods that may take
long (`from_disk`, `collect`, `seal`, ...) run beside the loop and touch nothing that serves; `swap` runs between two
steps, is short and cannot fail. A refusal is `CommandRefused`, with the client's message.

Memory: from the first update on the second set stays allocated, on the CPU beside the packed copies of the first,
because fresh memory costs more than anything else in an update.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
import torch

from quartet.runtime.config import ServerConfig
from quartet.runtime.control import ONLINE_FAILED, InitWeightsUpdateGroup, UpdateWeightsFromDistributed
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.model_files import hub
from quartet.runtime.shorten import short
from quartet.scheduler_service.host import memory as host_memory
from quartet.scheduler_service.host.background import unthrottled, yield_point
from quartet.scheduler_service.host.device import available_gb, shortage
from quartet.scheduler_service.weights import (
    device_staging,
    distributed,
    load,
    manifest,
    pickled,
    record,
    staging,
    ties,
    wire,
)
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.parameters import Packed, Weights
from quartet.scheduler_service.weights.record import Committed
from quartet.scheduler_service.weights.staging import on_one_thread

log = logging.getLogger(__name__)

Result = TypeVar("Result")

Collect = Callable[[], None]

NOT_OPENED = "Failed to get weights iterator: {}."
NOT_LOADED = "Failed to update weights: {}.\nRolling back to original weights."
NO_LOADER = "Failed to get model loader: {}."
TENSOR_FORMATS = {None: wire.named_tensors, "direct": wire.named_tensors, "flattened_bucket": wire.bucket_tensors}
BROADCAST_FORMATS = (None, "flattened_bucket")
FAULTS = (CheckpointError, OSError, MemoryError, RuntimeError)  # torch says RuntimeError when memory is short


@dataclass(frozen=True, slots=True)
class Staged:
    """New values, complete and checked, that only have to be put in place."""

    weights: Weights
    names: frozenset[str]  # the tensors that change
    packed: Packed
    source: Committed | None = None  # where they come from; None: over the wire


@dataclass(slots=True)
class Session:
    """Tensors collected so far; where only a part of a buffer is new, the rest was copied from what serves."""

    names: set[str] = field(default_factory=set)
    aliases: dict[str, torch.Tensor] = field(default_factory=dict)  # what must equal the tensors they are tied to
    version: str | None = None  # the label that its last bucket asked for
    broken: str = ""  # why it cannot be finished
    implicit: bool = False  # of one command alone, which puts it in place at once


class Updates:
    """Everything about changing the weights of one model, except when."""

    def __init__(
        self, live: Weights, config: ServerConfig, run_dir: str, check_config: Callable[[Path], None] = lambda _: None
    ) -> None:
        """`check_config` raises CheckpointError where the config.json of a directory describes another model."""
        self.live = live
        self.check_config = check_config
        self.config = config
        self.run_dir = run_dir
        self.inspection = Inspection(live)
        self.session: Session | None = None
        self.groups: dict[str, torch.distributed.ProcessGroup] = {}
        self.lost: set[str] = set()  # tensors whose values were given up with their memory
        self.turns: deque[object] = deque()  # commands that want the weights to themselves, in order
        self.committed = Committed(
            model_path=config.model_path,
            model_dir=config.model_dir,
            weight_version=config.weight_version,
            load_format=config.load_format,
        )
        self._second: Weights | None = None
        self._noting = threading.Lock()

    @property
    def second(self) -> Weights:
        """The second set of buffers; on the host where the device has no room for it.

        Raises CommandRefused where the host has none, which would end this process rather than raise an error.
        """
        if self._second is None:
            self._check_room()
            try:
                self._second = self.live.staging()
            except torch.OutOfMemoryError:
                log.warning("No room on %s for a second set of weights: it is kept on the host.", self.live.device)
                self._second = self.live.staging(torch.device("cpu"))
        return self._second

    def _check_room(self) -> None:
        live = self.live
        if live.device.type == "cpu" and (reason := shortage(live.served_bytes(), live.device)):
            raise CommandRefused(NOT_LOADED.format(f"there is no room for a second set of weights: {reason}"))

    def available_gb(self) -> float:
        return available_gb(self.live.device)

    def empty_cache(self) -> None:
        """Give the device memory back that is only kept in reserve."""
        if self.live.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_second(self) -> None:
        """Give the memory of the second set back; nothing may be staged."""
        self._second = None

    # stage and check: beside the loop

    @on_one_thread
    def from_disk(self, model_path: str, load_format: str, digests: Manifest | None) -> Staged:
        """All weights of a directory or a hub id."""
        if load_format not in load.LOAD_FORMATS:
            reason = f"load format {short(load_format)} is unknown; choose one of {', '.join(load.LOAD_FORMATS)}"
            raise CommandRefused(NO_LOADER.format(reason))
        directory = told_as(NOT_OPENED, lambda: self.locate(model_path))
        told_as(NOT_LOADED, lambda: self.check_config(directory))
        try:
            before, checkpoint = told_as(NOT_OPENED, lambda: opened(directory, load_format))
            told_as(NOT_LOADED, lambda: self.fill(checkpoint, before, digests))
        finally:
            pickled.forget()
        source = Committed(
            model_path=model_path,
            model_dir=str(directory),
            weight_version="",
            load_format=load_format,
            files={path.name: [f.size, f.written_ns] for path, f in before.items() if path.parent == directory},
        )
        return self.packed(self.new_names(), source)

    def new_names(self) -> frozenset[str]:
        """The tensors that a full second set changes. On a GPU they are compared: what is equal need not be copied."""
        names = frozenset(self.live.names())
        if self.live.device.type != "cuda" or self.second.device != self.live.device or self.lost:
            return names
        found = device_staging.changed(self.live, self.second, sorted(names))
        log.info("%d of %d tensors have changed.", len(found), len(names))
        return found

    def locate(self, model_path: str) -> Path:
        """The directory that a client means; downloads what is on the hub."""
        try:
            anywhere = msgspec.structs.replace(self.config, revision=None)  # that one is of the model at start
            return hub.find("model_path", model_path, anywhere, (*hub.WEIGHTS, *hub.TOKENIZER))
        except StartupError as error:
            log.debug("%s", error)
            raise CommandRefused(NOT_OPENED.format(f"{short(model_path, 500)} (repository not found)")) from error

    def fill(self, checkpoint: Checkpoint | None, before: staging.Identities, digests: Manifest | None) -> None:
        """Fill the second set; without a checkpoint with random values."""
        if checkpoint is None:
            self.second.fill_random(self.config.random_seed or load.DUMMY_SEED)
            return
        if digests is not None:
            manifest.check_names(digests, checkpoint)
        checkpoint = ties.completed(checkpoint, self.live.layout)
        staging.check(checkpoint, self.live)
        with nullcontext() if self.live.device.type == "cpu" else unthrottled():
            staging.read(checkpoint, before, self.second, digests)

    def open_session(self, broken: str = "", implicit: bool = False) -> None:
        self.session = Session(broken=broken, implicit=implicit)

    @property
    def in_session(self) -> bool:
        """Between a begin and an end that clients have asked for."""
        return self.session is not None and not self.session.implicit

    def payload(self, file: str, load_format: str | None) -> Collect:
        """What takes the tensors of a file into the session."""
        if load_format not in TENSOR_FORMATS:
            known = ", ".join(name or "null" for name in TENSOR_FORMATS)
            raise CommandRefused(f"load_format {short(load_format)} is not supported; choose one of {known}.")
        return partial(self.collect, partial(TENSOR_FORMATS[load_format], Path(file)), private=file)

    def broadcast(self, command: UpdateWeightsFromDistributed) -> Collect:
        """What takes the tensors that a trainer is about to broadcast into the session; refuses misfits at once."""
        group = self.groups.get(command.group_name)
        if group is None:
            raise CommandRefused(
                ONLINE_FAILED.format(f"there is no group {short(command.group_name)}; initialize it first")
            )
        if command.load_format not in BROADCAST_FORMATS:
            raise CommandRefused(ONLINE_FAILED.format(f"load_format {short(command.load_format)} is not supported"))
        entries = told_as(ONLINE_FAILED, lambda: self.expected(command))
        in_one = command.load_format == "flattened_bucket"
        return partial(self.collect, partial(distributed.receive_named, group, entries, self.live.device, in_one))

    def expected(self, command: UpdateWeightsFromDistributed) -> list[wire.BucketEntry]:
        """The tensors of a broadcast. Raises CheckpointError where they do not fit the model."""
        most = len(self.live.layout.places) + len(self.live.layout.ignored)
        if len(command.names) > most:
            raise CheckpointError(f"there are {len(command.names)} names, the model has {most}")
        if not len(command.names) == len(command.dtypes) == len(command.shapes):
            raise CheckpointError("names, dtypes and shapes differ in length")
        known = self.live.names()
        for name, shape in zip(command.names, command.shapes, strict=True):
            if name in self.live.layout.ignored:
                continue
            if name not in known:
                raise CheckpointError(f"the model has no tensor {short(name)}")
            if tuple(shape) != known[name][0]:
                raise CheckpointError(f"tensor {name} has shape {short(shape)}, the model needs {list(known[name][0])}")
        return wire.entries_of(command.names, command.dtypes, command.shapes)

    @on_one_thread
    def collect(self, tensors: Callable[[], wire.Named], private: str = "") -> None:
        """Put tensors into the session's second set. A fault breaks the session; clients do not see `private` names."""
        session = self.session
        assert session is not None
        try:
            told_as(NOT_LOADED, lambda: self._collect(session, tensors))
        except CommandRefused as refusal:
            session.broken = refusal.message.replace(private, "the payload") if private else refusal.message
            raise CommandRefused(session.broken) from refusal

    def _collect(self, session: Session, tensors: Callable[[], wire.Named]) -> None:
        with staging.beside_the_model(self.live.device):
            for name, values in tensors():
                if name in self.live.layout.ignored:
                    if name in self.live.layout.ties:
                        session.aliases[name] = values
                    continue
                if name not in self.live.layout.places:
                    raise CheckpointError(f"the model has no tensor {short(name)}")
                self._complete_buffer(session, name)
                staging.put(name, values, self.second)
                session.names.add(name)

    def _complete_buffer(self, session: Session, name: str) -> None:
        """Before a buffer's first new tensor: give it the values that serve, for those that will not be new."""
        places = self.live.layout.places
        buffer = places[name].buffer
        if not any(places[known].buffer == buffer for known in session.names):
            self.second.buffers[buffer].copy_(self.live.buffers[buffer])

    @on_one_thread
    def seal(self) -> Staged:
        """What the session has collected, ready to be put in place."""
        session = self.session
        assert session is not None
        told_as(NOT_LOADED, lambda: self._check_aliases(session))
        return self.packed(frozenset(session.names))

    def _check_aliases(self, session: Session) -> None:
        """Nothing that a trainer sends may be dropped in silence: one tensor of ours is to be two of theirs."""
        for alias, values in session.aliases.items():
            name = self.live.layout.ties[alias]
            serves = self.second if name in session.names else self.live
            ties.check_values(alias, values, name, serves.view(name))

    def packed(self, names: frozenset[str], source: Committed | None = None) -> Staged:
        return Staged(self.second, names, told_as(NOT_LOADED, lambda: self._packed(names)), source)

    def _packed(self, names: frozenset[str]) -> Packed:
        host_memory.warm(self.live.packed_sizes(names), yield_point)
        return self.live.pack(self.second, names, yield_point)

    @on_one_thread
    def randomized(self, names: Collection[str]) -> Staged:
        """Values that are certainly not those of the model."""
        for buffer in {self.live.layout.places[name].buffer for name in names}:
            self.second.buffers[buffer].copy_(self.live.buffers[buffer])
        for name in names:
            self.second.view(name).normal_()
        return self.packed(frozenset(names))

    # swap: between two steps

    def swap(self, staged: Staged, version: str) -> Packed:
        """Serve the staged values. Returns memory that is no longer needed, to be freed beside the loop."""
        old = self.live.take_over(staged.weights, staged.names, staged.packed)
        self.lost -= staged.names
        if staged.source is None:
            self.committed = msgspec.structs.replace(self.committed, patched=True)
        else:
            self.committed = msgspec.structs.replace(staged.source, weight_version=version)
        return old

    def relabel(self, version: str) -> None:
        """Call the weights that serve otherwise from now on."""
        if not self.committed.patched:
            self.committed = msgspec.structs.replace(self.committed, weight_version=version)

    # afterwards: beside the loop

    @on_one_thread
    def settle(self, old: Packed) -> None:
        """Record what serves, and free what served before.

        Piece by piece: the interpreter's lock is held while the system takes memory back, and a step needs that lock.
        """
        self.note()
        while old:
            blocks = list(old.pop()[1] or ())
            while blocks:
                blocks.pop()
                yield_point()

    def note(self) -> None:
        """Record what serves."""
        try:
            with self._noting:
                record.write(self.run_dir, self.committed)
        except OSError as error:
            log.error("Could not record the committed weights: %s. A restart would load the ones before.", error)

    # groups: beside the loop

    def join_group(self, command: InitWeightsUpdateGroup) -> None:
        """Meet a trainer. Raises CommandRefused."""
        if command.group_name in self.groups:
            raise distributed.failed_to_join(f"the group {short(command.group_name)} exists already")
        self.groups[command.group_name] = distributed.join(distributed.Place.of(command))

    def leave_group(self, name: str) -> None:
        distributed.leave(self.groups.pop(name))


def opened(directory: Path, load_format: str) -> tuple[staging.Identities, Checkpoint | None]:
    """The checkpoint of a directory, and what its files were before their headers were read."""
    if load_format == "dummy":
        return {}, None
    load.check_format(load_format, directory)
    before = staging.identities(directory)
    checkpoint = load.open_checkpoint(directory)
    own = {file: staging.identity(file.stat()) for file in checkpoint.files} if checkpoint.scratch else {}
    return before | own, checkpoint


def told_as(form: str, work: Callable[[], Result]) -> Result:
    """Do the work; a fault becomes a refusal in the client's words."""
    try:
        return work()
    except FAULTS as error:
        reason = str(error).strip().split("\n")[0].rstrip(".") or type(error).__name__
        raise CommandRefused(form.format(reason)) from error
