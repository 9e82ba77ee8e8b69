"""How a model writes tool calls, for the grammar that constrains them: made by the gateway, read by the scheduler.

[text up to `trigger`] before call separator call ... after

call: begin name [mark, number or id] middle arguments end
"""

from typing import Any, Literal

import msgspec


class ValueTags(msgspec.Struct, omit_defaults=True):
    """What stands around a parameter's name and its value."""

    begin: str  # before the name
    middle: str  # between the name and a value
    end: str  # behind a value
    text_middle: str = ""  # in place of `middle` before a value that is read as text; "": the schema says which are
    own_lines: bool = False  # the value stands on lines of its own


class CallRule(msgspec.Struct, omit_defaults=True):
    """The calls of one tool."""

    begin: str  # the name is in it
    middle: str
    end: str
    parameters: dict[str, Any]  # JSON schema
    raw: list[str] = []  # parameters whose values between tags are read as text


class CallGrammar(msgspec.Struct, omit_defaults=True):
    """The calls of all tools."""

    calls: list[CallRule]
    before: str = ""
    separator: str = ""
    after: str = ""
    mark: str = ""  # behind the name, before what `marked` says
    marked: Literal["", "number", "id"] = ""
    behind_thought: str = ""  # between a thought and calls
    body: Literal["json", "python", "tags"] = "json"
    tags: ValueTags | None = None  # of a body of tags
    trigger: str = ""  # text may come first, and calls are constrained from this on; "": calls are demanded
    single: bool = False  # one call
