"""Commands that load, replace and unload LoRA adapters.

An adapter is read, checked and packed in the background, and served from one step to the next.
"""

import logging
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from quartet.runtime.adapters import (
    DISTRIBUTED_PATH,
    LORA_OFF,
    TENSORS_PATH,
    ForgetAdapter,
    Load,
    LoadAdapter,
    LoadAdapterFromDistributed,
    LoadAdapterFromTensors,
    UnloadAdapter,
)
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import CommandRefused, StartupError
from quartet.runtime.limits import MAX_ADAPTERS
from quartet.runtime.messages import Message, Reply
from quartet.runtime.model_files import adapter_files
from quartet.runtime.shorten import short
from quartet.scheduler_service.control.agreement import agreed
from quartet.scheduler_service.control.context import Context, Handler, Resumable
from quartet.scheduler_service.control.weights import exclusive
from quartet.scheduler_service.weights import wire
from quartet.scheduler_service.weights.adapters import check_count, most_tensors
from quartet.scheduler_service.weights.parameters import Layout

if TYPE_CHECKING:
    from quartet.scheduler_service.execution.adapters import AdapterStore, Read
    from quartet.scheduler_service.weights.update import Updates

log = logging.getLogger(__name__)

ALREADY_LOADED = "The LoRA adapter {} is loaded already; unload it first, or replace it with load_inplace."
BEING_UNLOADED = "The LoRA adapter {} is being unloaded; its requests have not ended yet."
NOT_LOADED = "The LoRA adapter {} is not loaded."
TOO_MANY = "{} adapters are loaded; no more are taken."
NOT_READ = "Failed to load the LoRA adapter {}: {}"
ONE_PART = "serialized_named_tensors must have one entry, this has {}"
BUCKET = "flattened_bucket"
TENSORS = "adapter_model.safetensors"

LOADS: tuple[type[ControlCommand], ...] = (LoadAdapter, LoadAdapterFromTensors, LoadAdapterFromDistributed)
Reader = Callable[[], "tuple[str, Read]"]  # the adapter's directory, and what was read


def store_of(context: Context) -> "AdapterStore":
    if context.adapters is None:
        raise CommandRefused(LORA_OFF)
    return context.adapters


def load(context: Context, command: LoadAdapter) -> Resumable:
    """Load the adapter of a directory or a hub id."""
    store = store_of(context)

    def read() -> "tuple[str, Read]":
        directory = adapter_files.find("lora_path", command.lora_path, store.config)
        return str(directory), store.read(directory)

    return (yield from load_by(context, command, command.lora_path, read))


def load_from_tensors(context: Context, command: LoadAdapterFromTensors) -> Resumable:
    """Load an adapter whose tensors lie in a file that the gateway has written."""
    store = store_of(context)
    if len(command.payload_files) != 1:
        raise CommandRefused(ONE_PART.format(len(command.payload_files)))
    if command.load_format not in (None, "direct", BUCKET):
        raise CommandRefused(f"load_format {short(command.load_format)} is unknown; leave it out")
    refuse_added_tokens(command)
    read = partial(read_made, store, partial(write_sent, command, store.layout))
    command.load_inplace = command.load_inplace or command.upsert
    return (yield from load_by(context, command, TENSORS_PATH, read, owned=True))


def load_from_distributed(context: Context, updates: "Updates", command: LoadAdapterFromDistributed) -> Resumable:
    """Load an adapter whose tensors a trainer broadcasts meanwhile."""
    store = store_of(context)
    refuse_added_tokens(command)

    def write(directory: Path) -> None:
        tensors = store.receive(updates.groups, command)
        (directory / adapter_files.SETTINGS).write_bytes(msgspec.json.encode(command.config_dict))
        wire.write_plain(tensors, directory / TENSORS)

    command.load_inplace = command.load_inplace or command.upsert
    return (yield from load_by(context, command, DISTRIBUTED_PATH, partial(read_made, store, write), owned=True))


def refuse_added_tokens(command: LoadAdapterFromTensors | LoadAdapterFromDistributed) -> None:
    if command.added_tokens_config:
        raise CommandRefused("added_tokens_config is not supported: an adapter cannot add tokens")


def read_made(store: "AdapterStore", write: Callable[[Path], None]) -> "tuple[str, Read]":
    """The adapter of a new directory, which `write` fills."""
    directory = store.new_directory()
    try:
        write(directory)
        return str(directory), store.read(directory)
    except BaseException:
        shutil.rmtree(directory, ignore_errors=True)
        raise


def write_sent(command: LoadAdapterFromTensors, layout: Layout, directory: Path) -> None:
    """Make a directory of an adapter of what was sent, for a model of this layout. Raises CheckpointError."""
    payload, file = Path(command.payload_files[0]), directory / TENSORS
    wire.refuse_pickle(payload)
    check_count(payload, layout)
    (directory / adapter_files.SETTINGS).write_bytes(msgspec.json.encode(command.config_dict))
    if command.load_format == BUCKET:
        wire.write_plain(wire.bucket_tensors(payload, most_tensors(layout)), file)
    else:
        shutil.copyfile(payload, file)
    wire.check_checksums(file, command.expected_checksums or {})


def load_by(context: Context, command: Load, path: str, read: Reader, owned: bool = False) -> Resumable:
    """Wait for earlier loads, read in the background, and serve the adapter from the next step on."""
    store, name = store_of(context), command.lora_name
    while any(map(context.has_unfinished, LOADS)):
        yield
    check_name(store, command)
    try:
        directory, found = yield from store.in_background(lambda: refusing(name, read))
        try:
            check_name(store, command)
            is_new = name not in store.known or name in store.ending
            if name not in store.loaded and (is_new or command.pinned):  # else it needs no more memory now
                store.make_room({request.adapter for request in context.requests})
            yield from agreed(context, command)
        except CommandRefused:
            if owned:
                shutil.rmtree(directory, ignore_errors=True)
            raise
    finally:
        discard_payload(command)
    store.install(name, path, directory, found, command.pinned, owned)
    if not store.has_room(0):  # an evicted one was replaced, or others came meanwhile; it is read when it is named
        store.evict(store.victim({request.adapter for request in context.requests}) or name)
    context.adapters_changed()
    log.info("loaded the adapter %s, version %s", name, store.version_of[name])
    return answer(store, command)


def refusing(name: str, read: Reader) -> "tuple[str, Read]":
    """What `read` returns; its errors as a refusal."""
    try:
        return read()
    except (StartupError, OSError) as error:
        raise CommandRefused(NOT_READ.format(name, error)) from error


def check_name(store: "AdapterStore", command: Load) -> None:
    """Raise CommandRefused unless the name is free, or its adapter is to be replaced.

    An adapter whose unloading was answered is replaced: its requests go on with the weights that come.
    """
    name, loaded = command.lora_name, store.known.keys() - store.ending
    if name in store.leaving - store.ending:
        raise CommandRefused(BEING_UNLOADED.format(name))
    if name in loaded and not command.load_inplace:
        raise CommandRefused(ALREADY_LOADED.format(name))
    if name not in loaded and len(loaded) >= MAX_ADAPTERS:
        raise CommandRefused(TOO_MANY.format(len(loaded)))


def discard_payload(command: Load) -> None:
    """Remove the files that came with a command."""
    if isinstance(command, LoadAdapterFromTensors):
        for file in command.payload_files:
            Path(file).unlink(missing_ok=True)


def unload(context: Context, command: UnloadAdapter) -> Resumable:
    """Take no more requests for an adapter, and wait for those that use it.

    While no step runs there is nothing to wait for. It is kept until `ForgetAdapter` says that none of its requests can
    come again: one whose end was lost with a process of the ring does. Of such adapters the last one is in memory.
    """
    store, name = store_of(context), command.lora_name
    users = users_of(context, name)
    if name not in store.known or (name in store.ending and not users):
        raise CommandRefused(NOT_LOADED.format(name))
    if name in store.leaving:
        raise CommandRefused(BEING_UNLOADED.format(name))
    store.leave(name)
    context.tell_state()
    while (users := users_of(context, name)) and not (context.planner.paused or context.planner.asleep):
        yield
    store.end_later(name)
    for other in store.ending - {name}:
        if not users_of(context, other):
            store.take_out(other)
    if users:
        log.info("the adapter %s goes with the last of %d requests that wait; no step runs now", name, users)
    else:
        log.info("unloaded the adapter %s", name)
    return answer(store, command)


def forget(context: Context, command: ForgetAdapter) -> list[Message]:
    """Forget an adapter that was unloaded, as soon as no request names it here."""
    context.adapter_queue.let_go(command.lora_name, command.version)
    return []


def users_of(context: Context, name: str) -> int:
    """How many requests name an adapter."""
    return sum(request.adapter == name for request in context.requests)


def answer(store: "AdapterStore", command: ControlCommand) -> list[Message]:
    """The reply: what requests may name now."""
    adapters = store.state()
    paths = {adapter["name"]: adapter["path"] for adapter in adapters}
    return [Reply(id=command.id, body={"loaded_adapters": paths, "adapters": adapters})]


HANDLERS: dict[type[ControlCommand], Handler] = {
    LoadAdapter: load,
    LoadAdapterFromTensors: load_from_tensors,
    LoadAdapterFromDistributed: exclusive(load_from_distributed),
    UnloadAdapter: unload,
    ForgetAdapter: forget,
}
