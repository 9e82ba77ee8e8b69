"""A scheduler process without a model that knows adapters by name alone: `python -m tests.fake_adapters`.

For tests of what stands around the scheduler. It answers the commands, tells of adapters and versions, waits before it
unloads one that is used, and reads the names of the tensors that a client sends; the output does not depend on them.
"""

from collections.abc import Generator
from pathlib import Path
from typing import Any

import msgspec
import safetensors

from quartet.runtime.adapters import (
    NEVER_LOADED,
    TENSORS_PATH,
    Adapter,
    LoadAdapter,
    LoadAdapterFromTensors,
    UnloadAdapter,
)
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message, Reply
from quartet.runtime.model_files import model_info
from quartet.runtime.service import Boot, run
from quartet.scheduler_service import scheduler
from quartet.scheduler_service.assemble import serve
from quartet.scheduler_service.control.context import Context
from tests.fakes import FakeWorker

RANK = 8
STEP_S = 0.01

known: dict[str, Adapter] = {}
versions: dict[str, str] = {}  # of all that were ever known


def put(name: str, path: str, rank: int, pinned: bool, inplace: bool = False) -> None:
    """Note an adapter. Raises CommandRefused for a name that is in use."""
    if name in known and not inplace:
        raise CommandRefused(f"Failed to load LoRA adapter {name}: it is already loaded.")
    version = str(int(known[name].version) + 1) if name in known else "1"
    known[name] = Adapter(name=name, path=path, version=version, rank=rank, pinned=pinned)
    versions[name] = version


def told() -> dict[str, Any]:
    paths = {adapter.name: adapter.path for adapter in known.values()}
    return {"loaded_adapters": paths, "adapters": msgspec.to_builtins(list(known.values()))}


def load(context: Context, command: LoadAdapter) -> list[Message]:
    put(command.lora_name, command.lora_path, RANK, command.pinned, command.load_inplace)
    return [Reply(id=command.id, body=told())]


def load_tensors(context: Context, command: LoadAdapterFromTensors) -> list[Message]:
    """An adapter whose tensors are in the file that the gateway has written."""
    try:
        assert safetensors.deserialize(Path(command.payload_files[0]).read_bytes())
    except safetensors.SafetensorError as error:
        raise CommandRefused(f"These are no tensors: {error}") from error
    put(command.lora_name, TENSORS_PATH, command.config_dict["r"], command.pinned, command.load_inplace)
    return [Reply(id=command.id, body=told())]


def unload(context: Context, command: UnloadAdapter) -> Generator[None, bool | None, list[Message]]:
    """Tell the gateway at once, and reply when no request uses the adapter any more."""
    if known.pop(command.lora_name, None) is None:
        raise CommandRefused(NEVER_LOADED.format(command.lora_name))
    context.tell_state()
    while any(request.adapter == command.lora_name for request in context.requests):
        yield
    return [Reply(id=command.id, body=told())]


class Store:
    """What the scheduler asks of its adapters."""

    ending: frozenset[str] = frozenset()

    @property
    def version_of(self) -> dict[str, str]:
        return versions

    @property
    def known(self) -> dict[str, Adapter]:
        return known

    def use(self, name: str) -> bool:
        """Every adapter that is known is there."""
        return name in known

    def state(self) -> list[Any]:
        adapters: list[Any] = told()["adapters"]
        return adapters


def main(boot: Boot) -> None:
    scheduler.HANDLERS.update({LoadAdapter: load, LoadAdapterFromTensors: load_tensors, UnloadAdapter: unload})  # type: ignore[attr-defined]
    for source in boot.config.adapters:
        put(source.lora_name, source.lora_path, RANK, source.pinned)
    info = model_info.load(boot.config)
    worker = FakeWorker(page_size=16, page_count=4096, vocab_size=info.vocab_size, step_s=STEP_S)
    serve(boot, info, worker, adapters=Store())  # type: ignore[arg-type]


if __name__ == "__main__":
    run(main)
