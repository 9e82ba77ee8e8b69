"""Tool calls by the names of their formats: what reads them, and the grammars of calls that are demanded."""

import json
from collections.abc import Sequence
from typing import Any

import msgspec

from quartet.http_gateway.parsers.call_formats import FORMATS, CallFormat, Frame
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tagged_calls import Tags, kinds_of
from quartet.http_gateway.parsers.tool_events import Function, Parsed, Tool, collect
from quartet.http_gateway.parsers.tool_schemas import without_prose
from quartet.runtime.call_grammar import CallGrammar, CallRule, ValueTags
from quartet.runtime.errors import RequestError

NO_PARAMETERS: dict[str, Any] = {"type": "object", "properties": {}}


def format_of(name: str) -> CallFormat:
    """A format by its `--tool-call-parser` name. Raises RequestError."""
    if name not in FORMATS:
        raise RequestError(
            f"Unsupported tool call parser {name!r}, use one of: {', '.join(FORMATS)}.", field="tool_call_parser"
        )
    return FORMATS[name]


def names_of(tools: Sequence[Tool]) -> list[str]:
    return [tool.function.name for tool in tools]


def schemas_of(tools: Sequence[Tool]) -> dict[str, Any]:
    return {tool.function.name: tool.function.parameters or {} for tool in tools}


def parse(calls: CallFormat, tools: Sequence[Tool], text: str) -> Parsed:
    """Content and calls of a whole output."""
    reading = OutputReader(calls=calls, known=names_of(tools), schemas=schemas_of(tools))
    return collect([*reading.feed(text), *reading.finish()])


def calls_schema(tools: Sequence[Tool], name: str | None = None, parallel: bool = True) -> str:
    """JSON schema of the calls that `tool_choice` demands: any of the tools, or the named one. Raises RequestError."""
    if not tools:
        raise RequestError("Tools cannot be empty if tool choice is set to required.", field="tools")
    chosen = [(index, tool) for index, tool in enumerate(tools) if name in (None, tool.function.name)]
    if not chosen:
        raise RequestError(f"Tool '{name}' not found in tools list.", field="tool_choice")
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [call_schema(tool, index) for index, tool in chosen]},
    }
    if name is not None or not parallel:
        schema["maxItems"] = 1
    return json.dumps(schema)


def call_schema(tool: Tool, index: int) -> dict[str, Any]:
    """One call."""
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": parameters_schema(tool, index)},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }


def parameters_schema(tool: Tool, index: int) -> dict[str, Any]:
    """The schema of a tool's parameters, as a resource of its own: its references start at its own root."""
    parameters = NO_PARAMETERS if tool.function.parameters is None else tool.function.parameters
    return {"$id": f"tool:{index}", **without_prose(parameters)}


def demanded_calls(
    calls: CallFormat, tools: Sequence[Tool], name: str | None, parallel: bool
) -> tuple[str, str] | None:
    """The grammar of the calls that `tool_choice` demands, as the model itself writes them.

    None where it is not known how it does. The tool that is named, if any, is one of the tools.
    """
    if calls.frame is None:
        return None
    chosen = [tool for tool in tools if name in (None, tool.function.name)]
    single = calls.frame.alone or name is not None or not parallel
    return "call_grammar", grammar_text(calls, calls.frame, chosen, single=single)


def strict_calls(calls: CallFormat, tools: Sequence[Tool]) -> tuple[str, str] | None:
    """The grammar under which a call, once the model begins one, fits its tool; None where no tool is strict."""
    if (
        calls.frame is None
        or not calls.opening
        or calls.shared_opening
        or not any(tool.function.strict for tool in tools)
    ):
        return None
    free = {"type": "object", "additionalProperties": True}
    asked = [
        tool if tool.function.strict else Tool(Function(tool.function.name, parameters=free), tool.type)
        for tool in tools
    ]
    return "call_grammar", grammar_text(calls, calls.frame, asked, trigger=calls.opening)


def grammar_text(
    calls: CallFormat, frame: Frame, tools: Sequence[Tool], *, trigger: str = "", single: bool = False
) -> str:
    """A CallGrammar for these tools, in JSON."""
    grammar = CallGrammar(
        calls=[call_rule(calls, frame, tool) for tool in tools],
        before=frame.before,
        separator=frame.separator,
        after=frame.after,
        mark=frame.mark,
        marked=frame.marked,
        behind_thought=frame.behind_thought,
        body=calls.body,
        tags=value_tags(calls.tags) if calls.tags else None,
        trigger=trigger,
        single=single,
    )
    return msgspec.json.encode(grammar).decode()


def call_rule(calls: CallFormat, frame: Frame, tool: Tool) -> CallRule:
    """How calls of one tool are written."""
    name, parameters = tool.function.name, tool.function.parameters
    properties = parameters.get("properties") if parameters else None
    declared = properties if isinstance(properties, dict) else {}  # anything else is refused with the grammar
    raw = [key for key, schema in declared.items() if "string" in kinds_of(schema)]
    return CallRule(
        begin=frame.begin + (json.dumps(name, ensure_ascii=False) if frame.quoted else name),
        middle=frame.middle,
        end=frame.end,
        parameters=NO_PARAMETERS if parameters is None else without_prose(parameters),
        raw=raw if calls.tags else [],
    )


def value_tags(tags: Tags) -> ValueTags:
    """What stands around a parameter's name and value; an opening of the value stands on a line of its own."""
    blank = " " if tags.text_begin else "\n"
    middle = tags.key_end + (blank + tags.value_begin if tags.value_begin else "") + "\n" * tags.own_lines
    text_middle = tags.key_end + blank + tags.text_begin if tags.text_begin else ""
    return ValueTags(tags.key_begin, middle, tags.value_end, text_middle, tags.own_lines)
