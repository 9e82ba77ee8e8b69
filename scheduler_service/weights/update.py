"""Changes the weights while they serve: stage, check, swap.

`Updates` holds the second set of buffers and the state of a change that is under way. Its methods that may take long
(`from_disk`, `collect`, `finish_session`, ...) run in the background and touch nothing that serves; `swap` runs between
two steps, is short and cannot fail. A refusal is `CommandRefused`, with the client's message.

Memory: from the first update on the second set stays allocated, on a CPU in addition to the packed copies of the first,
because fresh memory costs more than anything else in an update.
"""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import msgspec
import torch

from quartet.kernels.cpu.native.quantized import rounded
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.control import (
    ONE_PAYLOAD_A_RANK,
    ONLINE_FAILED,
    InitWeightsUpdateGroup,
    UpdateWeightsFromDistributed,
)
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.model_files import hub, hub_download
from quartet.runtime.model_files.gguf import GgufError
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
    storage,
    ties,
    wire,
)
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError
from quartet.scheduler_service.weights.inspection import Inspection
from quartet.scheduler_service.weights.manifest import Manifest
from quartet.scheduler_service.weights.parameters import Packed, Weights
from quartet.scheduler_service.weights.record import Committed
from quartet.scheduler_service.weights.refusals import INTERNAL, NO_LOADER, NOT_LOADED, NOT_OPENED, refused_as
from quartet.scheduler_service.weights.session import Session
from quartet.scheduler_service.weights.staging import on_one_thread

log = logging.getLogger(__name__)

Collect = Callable[[], None]

TENSOR_FORMATS = {None: wire.named_tensors, "direct": wire.named_tensors, "flattened_bucket": wire.bucket_tensors}
BROADCAST_FORMATS = (None, "flattened_bucket")


@dataclass(frozen=True, slots=True)
class Staged:
    """New values, complete and checked, ready for the swap."""

    weights: Weights
    names: frozenset[str]  # the tensors that change
    packed: Packed
    source: Committed | None = None  # the checkpoint; None: they came in requests


class Updates:
    """Stages and swaps the weights of one model; the commands say when."""

    def __init__(
        self, live: Weights, config: ResolvedConfig, run_dir: str, check_config: Callable[[Path], None] = lambda _: None
    ) -> None:
        """`check_config` raises CheckpointError where the config.json of a directory describes another model."""
        self.live = live
        self.check_config = check_config
        self.config = config
        self.run_dir = run_dir
        self.inspection = Inspection(live)
        self.session: Session | None = None
        self.groups: dict[str, torch.distributed.ProcessGroup] = {}
        self.joining: set[str] = set()  # names of groups that wait for their trainer
        self.leaving: set[str] = set()  # and of those that are being left
        self.lost: set[str] = set()  # tensors whose values were lost when their memory was released
        self.commands: deque[object] = deque()  # those that need the weights for themselves, in order; the first runs
        self.committed = Committed.at_start(config)
        self._second: Weights | None = None
        self._record_lock = threading.Lock()

    @property
    def second(self) -> Weights:
        """The second set of buffers; on the host where the device has no room for it.

        Raises CommandRefused where the host has none: the kernel would kill this process rather than raise an error.
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
        """Free device memory that torch keeps in its cache."""
        if self.live.device.type == "cuda":
            torch.cuda.empty_cache()

    def drop_second(self) -> None:
        """Free the second set; nothing may be staged."""
        self._second = None

    # stage and check: in the background

    @on_one_thread
    def from_disk(self, model_path: str, load_format: str, digests: Manifest | None) -> Staged:
        """All weights of a directory or a hub id."""
        if load_format not in load.LOAD_FORMATS:
            reason = f"load format {short(load_format)} is unknown; choose one of {', '.join(load.LOAD_FORMATS)}"
            raise CommandRefused(NO_LOADER.format(reason))
        with refused_as(NOT_OPENED):
            directory = self.locate(model_path)
        with refused_as(NOT_LOADED):
            self.check_config(directory)
        try:
            with refused_as(NOT_OPENED):
                before, checkpoint = staging.open_checkpoint(directory, load_format)
            with refused_as(NOT_LOADED):
                self.fill(checkpoint, before, digests)
        finally:
            pickled.forget_converted()
        source = Committed(
            model_path=model_path,
            model_dir=str(directory),
            weight_version="",
            load_format=load_format,
            files={
                str(path.relative_to(directory)): [f.size, f.written_ns]
                for path, f in before.items()
                if path.is_relative_to(directory)
            },
        )
        return self.packed(self.new_names(), source)

    def new_names(self) -> frozenset[str]:
        """The tensors that a full second set changes. On a GPU they are compared: equal ones need not be copied."""
        names = frozenset(self.live.names())
        if self.live.device.type != "cuda" or self.second.device != self.live.device or self.lost:
            return names
        changed = device_staging.changed_tensors(self.live, self.second, sorted(names))
        log.info("%d of %d tensors have changed.", len(changed), len(names))
        return changed

    def locate(self, model_path: str) -> Path:
        """The directory of a path or a hub id, downloaded if need be. Raises CommandRefused."""
        try:
            anywhere = msgspec.structs.replace(self.config, revision=None)  # the revision is that of the model at start
            patterns = (*hub.WEIGHTS, *hub.TOKENIZER)
            return hub.find("model_path", model_path, anywhere, patterns, Path(self.run_dir), with_tokenizer=False)
        except StartupError as error:
            log.debug("%s", error)
            what = short(model_path, 500) if hub_download.is_hub_id(model_path) else short(error, 1000)
            reason = error if isinstance(error, GgufError) else f"{what} (repository not found)"
            raise CommandRefused(NOT_OPENED.format(reason)) from error

    def fill(self, checkpoint: Checkpoint | None, before: staging.Identities, digests: Manifest | None) -> None:
        """Fill the second set; without a checkpoint with random values. Raises CheckpointError."""
        if checkpoint is None:
            self.second.fill_random(self.config.dummy_seed)
            return
        if digests is not None:
            manifest.check_names(digests, checkpoint)
            if self.live.layout.cuts:
                manifest.check_share(digests, checkpoint, self.live.layout.parallel)
                digests = None
        checkpoint = ties.with_tied_tensors(checkpoint, self.live.layout)
        checkpoint = staging.check_checkpoint(checkpoint, self.live)
        with nullcontext() if self.live.device.type == "cpu" else unthrottled():
            staging.stage_checkpoint(checkpoint, before, self.second, digests)

    def open_session(self, broken: str = "", implicit: bool = False) -> None:
        self.session = Session(broken=broken, implicit=implicit)

    def break_session(self, reason: str) -> None:
        """An open session cannot be finished any more; the first reason stays."""
        if self.session is not None:
            self.session.broken = self.session.broken or reason

    def close_session(self) -> None:
        self.session = None

    @property
    def in_session(self) -> bool:
        """Whether a client has begun an update and not ended it."""
        return self.session is not None and not self.session.implicit

    def payload(self, files: list[str], load_format: str | None) -> Collect:
        """A function that collects the tensors of this rank's file into the session. Raises CommandRefused."""
        ranks = self.live.layout.parallel
        if len(files) != ranks.size:
            raise CommandRefused(ONE_PAYLOAD_A_RANK.format(ranks.size, len(files)))
        if load_format not in TENSOR_FORMATS:
            known = ", ".join(name or "null" for name in TENSOR_FORMATS)
            raise CommandRefused(f"load_format {short(load_format)} is not supported; choose one of {known}.")
        file = files[ranks.rank]
        return partial(self.collect, partial(TENSOR_FORMATS[load_format], Path(file)), private=file)

    def broadcast(self, command: UpdateWeightsFromDistributed) -> Collect:
        """A function that collects the tensors a trainer is about to broadcast. Raises CommandRefused for misfits."""
        group = self.groups.get(command.group_name)
        if group is None:
            reason = f"there is no group {short(command.group_name)}; initialize it first"
            raise CommandRefused(ONLINE_FAILED.format(reason))
        if command.load_format not in BROADCAST_FORMATS:
            raise CommandRefused(ONLINE_FAILED.format(f"load_format {short(command.load_format)} is not supported"))
        with refused_as(ONLINE_FAILED):
            entries = self.expected(command)
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
            if tuple(shape) != (needed := self.live.layout.whole_shape(name)):
                raise CheckpointError(f"tensor {name} has shape {short(shape)}, the model needs {list(needed)}")
        return wire.entries_of(command.names, command.dtypes, command.shapes)

    @on_one_thread
    def collect(self, tensors: Callable[[], wire.Named], private: str = "") -> None:
        """Put tensors into the second set. An error breaks the session; `private` is replaced in its message."""
        session = self.session
        assert session is not None
        try:
            with refused_as(NOT_LOADED):
                self._collect(session, tensors)
        except CommandRefused as refusal:
            message = refusal.message.replace(private, "the payload") if private else refusal.message
            self.break_session(message)
            raise CommandRefused(message) from refusal
        except BaseException as error:
            self.break_session(INTERNAL.format(type(error).__name__))
            raise

    def _collect(self, session: Session, tensors: Callable[[], wire.Named]) -> None:
        with staging.copy_stream(self.live.device):
            for name, values in tensors():
                if name in self.live.layout.ignored:
                    if name in self.live.layout.ties:
                        session.aliases[name] = values
                    continue
                if name not in self.live.layout.places:
                    raise CheckpointError(f"the model has no tensor {short(name)}")
                self._complete_buffer(session, name)
                staging.stage_tensor(name, values, self.second)
                session.names.add(name)

    def _complete_buffer(self, session: Session, name: str) -> None:
        """Before a buffer's first new tensor: copy the values that serve, for the tensors that stay as they are."""
        places = self.live.layout.places
        buffer = places[name].buffer
        if not any(places[known].buffer == buffer for known in session.names):
            self.second.copy_buffer(self.live, buffer)

    @on_one_thread
    def finish_session(self) -> Staged:
        """What the session has collected, ready for the swap."""
        session = self.session
        assert session is not None
        with refused_as(NOT_LOADED):
            self._check_aliases(session)
        return self.packed(frozenset(session.names))

    def _check_aliases(self, session: Session) -> None:
        """Raise CheckpointError where a trainer sent two different tensors for one of the model."""
        for alias, values in session.aliases.items():
            name = self.live.layout.ties[alias]
            serves = self.second if name in session.names else self.live
            served, quantized = serves.view(name), serves.quantized_of(name)
            values = self.live.layout.own_part(name, values)
            if quantized is not None and values.shape == served.shape:
                values = rounded(values.to(served.dtype), quantized.scheme)
            ties.check_tied_values(alias, values, name, served)

    def packed(self, names: frozenset[str], source: Committed | None = None) -> Staged:
        """The second set with the packed forms of these tensors. Raises CommandRefused."""
        with refused_as(NOT_LOADED):
            host_memory.warm(self.live.packed_sizes(names), yield_point)
            return Staged(self.second, names, self.live.pack(self.second, names, yield_point), source)

    @on_one_thread
    def randomized(self, names: Collection[str], seed: int | None = None) -> Staged:
        """Random values for these tensors; the same for the same seed, on every rank."""
        generator = torch.Generator()
        generator.manual_seed(generator.seed() if seed is None else seed)
        for buffer in {self.live.layout.places[name].buffer for name in names}:
            self.second.copy_buffer(self.live, buffer)
        for name in names:
            with self.second.writing(name, yield_point) as values:
                whole = torch.empty(self.live.layout.whole_shape(name)).normal_(generator=generator)
                values.copy_(self.live.layout.own_part(name, whole))
        return self.packed(frozenset(names))

    # swap: between two steps

    def drop_staged(self) -> None:
        """What was staged is not served after all. Here nothing holds it."""

    def swap(self, staged: Staged, version: str) -> Packed:
        """Serve the staged values. Returns memory that is no longer needed, for `after_swap`."""
        old = self.live.take_over(staged.weights, staged.names, staged.packed)
        self.lost -= staged.names
        if staged.source is None:
            self.committed = msgspec.structs.replace(self.committed, patched=True)
        else:
            self.committed = msgspec.structs.replace(staged.source, weight_version=version)
        return old

    def relabel(self, version: str) -> None:
        """Change the version of the weights that serve."""
        if not self.committed.patched:
            self.committed = msgspec.structs.replace(self.committed, weight_version=version)

    # after the swap: in the background

    def after_swap(self, old: Packed) -> None:
        """Record what serves, and free what served before."""
        self.write_record()
        self.free(old)

    @on_one_thread
    def free(self, old: Packed) -> None:
        """Piece by piece: the interpreter's lock is held while the system takes memory back; a step needs that lock."""
        while old:
            blocks = list(old.pop()[1] or ())
            while blocks:
                blocks.pop()
                yield_point()

    def write_record(self) -> None:
        """Record what serves, for a restart."""
        try:
            with self._record_lock:
                served = msgspec.structs.replace(self.committed, schemes=storage.recorded(self.live.schemes))
                record.write_record(self.run_dir, served)
        except OSError as error:
            log.error("Could not record the committed weights: %s. A restart would load the ones before.", error)

    # process groups: in the background

    def join_group(self, command: InitWeightsUpdateGroup) -> None:
        """Meet a trainer. There is no group of that name. Raises CommandRefused."""
        self.groups[command.group_name] = distributed.join(distributed.GroupSpec.of(command))

    def leave_group(self, name: str) -> None:
        distributed.leave(self.groups.pop(name))
