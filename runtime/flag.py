"""What a field of `ServerConfig` says of itself as a flag: its help, its group, its names, and the types of values."""

from typing import Annotated, Any, Literal

import msgspec

from quartet.runtime.limits import MAX_DRAFTED_TOKENS, MAX_LORA_RANK, MAX_SCHEDULERS


class Flag(msgspec.Struct, frozen=True):
    """How a field appears on the command line."""

    group: str
    aliases: tuple[str, ...] = ()
    secret: bool = False  # never shown or echoed
    several: bool = False  # takes a list: separated by commas, by repeating the flag, or a list of the file
    words: bool = False  # takes a list, separated by spaces
    bare: str = ""  # the value of the flag without one
    variable: str = ""  # environment variable that gives the value where neither flag nor file does


def flag(help: str, group: str, *aliases: str, **more: Any) -> Any:
    """The metadata of a flag field; `more` are fields of Flag."""
    return msgspec.Meta(description=help, extra={"flag": Flag(group, aliases, **more)})


GROUPS = MODEL, HTTP, SCHEDULER, SPECULATION, LORA, DEVICE, OPERATIONS = (  # in the order of the help
    "model",
    "http",
    "scheduler",
    "speculation",
    "lora",
    "device",
    "operations",
)
LogLevel = Literal["debug", "info", "warning", "error"]
Positive = Annotated[int, msgspec.Meta(ge=1)]
Size = Annotated[int, msgspec.Meta(ge=1, le=MAX_SCHEDULERS)]
Natural = Annotated[int, msgspec.Meta(ge=0)]
Share = Annotated[float, msgspec.Meta(gt=0, le=1)]
BufferSize = Annotated[int, msgspec.Meta(ge=-1)]
DraftSize = Annotated[int, msgspec.Meta(ge=1, le=MAX_DRAFTED_TOKENS)]
LoraRank = Annotated[int, msgspec.Meta(ge=1, le=MAX_LORA_RANK)]
ChunkSize = Annotated[int, msgspec.Meta(ge=-1)]
PortNumber = Annotated[int, msgspec.Meta(ge=0, le=65535)]
Seconds = Annotated[float, msgspec.Meta(ge=0)]
TimeLimit = Annotated[float, msgspec.Meta(ge=-1)]
