"""What a client sees of the reply to a control command. Each command declares its shape with its fields (control.py).

A refusal is {"success": false, "message"} with its status, unless the shape says otherwise.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class AsJson:
    """{"success", "message"}, and fields of the reply's body."""

    fields: tuple[str, ...] | None = None  # None: all
    defaults: Mapping[str, Any] = field(default_factory=dict)  # of fields that the body lacks


@dataclass(frozen=True)
class AsText:
    """The message alone, as text."""

    refusal_is_text: bool = False  # else it is an error of the native API


@dataclass(frozen=True)
class AsNull:
    """JSON's null: clients parse it."""


@dataclass(frozen=True)
class AsStatus:
    """{"message", "status": "ok"}"""


@dataclass(frozen=True)
class AsField:
    """One field of the reply's body by itself. A refusal is {"error": {"message"}} with status 400."""

    name: str


@dataclass(frozen=True)
class AsAdapters:
    """{"success", "error_message", "loaded_adapters": name → path}; a refusal looks the same."""


ReplyShape = AsAdapters | AsJson | AsText | AsNull | AsStatus | AsField
EVERYTHING = AsJson()
SUCCESS_AND_MESSAGE = AsJson(fields=())
TEXT = AsText()
NULL = AsNull()
STATUS = AsStatus()
