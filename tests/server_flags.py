"""Writes runtime/api/server_flags.py from the fields of ServerConfig: `python -m tests.server_flags`."""

import subprocess
import sys
import typing
from typing import Any, Literal, get_args, get_origin

from quartet.runtime import format_names
from quartet.runtime.config import ServerConfig
from quartet.runtime.settings.flags import settings
from tests.structure import ROOT

PLACE = ROOT / "runtime" / "api" / "server_flags.py"
HEAD = '''"""The flags of a server as keyword arguments, with their types. Made by `python -m tests.server_flags`."""

from typing import Literal, TypedDict

from quartet.runtime.format_names import ReasoningParser, ToolCallParser


class ServerFlags(TypedDict, total=False):
    """Every flag of `quartet serve`, with underscores."""

'''
NAMED = {format_names.ReasoningParser: "ReasoningParser", format_names.ToolCallParser: "ToolCallParser"}


def kinds() -> dict[str, Any]:
    """Flag → type; lists are taken where several values are."""
    hints = typing.get_type_hints(ServerConfig)
    return {name: hints[name] | list[str] if one.flag.several else hints[name] for name, one in settings().items()}


def rendered(kind: Any) -> str:
    """A type as it is written."""
    if kind in NAMED:
        return NAMED[kind]
    if get_origin(kind) is Literal:
        return f"Literal[{', '.join(map(repr, get_args(kind)))}]"
    if kind is type(None):
        return "None"
    if get_origin(kind) in (None, list):
        return kind.__name__ if isinstance(kind, type) and not get_args(kind) else str(kind)
    return " | ".join(sorted(map(rendered, get_args(kind)), key="None".__eq__))  # None comes last


def source() -> str:
    return HEAD + "".join(f"    {name}: {rendered(kind)}\n" for name, kind in kinds().items())


if __name__ == "__main__":
    PLACE.write_text(source())
    sys.exit(subprocess.call(["ruff", "format", "--quiet", str(PLACE)]))
