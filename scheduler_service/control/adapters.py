"""Commands that load, replace and unload LoRA adapters."""

from quartet.runtime.adapters import LORA_OFF, LoadAdapter, LoadAdapterFromTensors, UnloadAdapter
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import CommandRefused
from quartet.runtime.messages import Message
from quartet.scheduler_service.control.context import Context, Handler


def refuse(context: Context, command: LoadAdapter | LoadAdapterFromTensors | UnloadAdapter) -> list[Message]:
    """A server without adapters takes none."""
    raise CommandRefused(LORA_OFF)


HANDLERS: dict[type[ControlCommand], Handler] = {
    LoadAdapter: refuse,
    LoadAdapterFromTensors: refuse,
    UnloadAdapter: refuse,
}
