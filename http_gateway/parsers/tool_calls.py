"""Tool calls by the names of their formats: what reads them, and the grammars of calls that are demanded."""

import json
from collections.abc import Sequence
from typing import Any

from quartet.http_gateway.parsers.call_formats import FORMATS, CallFormat
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tool_events import Parsed, Tool, collect
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
    return {"$id": f"tool:{index}", **parameters}


def strict_calls(calls: CallFormat, tools: Sequence[Tool]) -> tuple[str, str] | None:
    """The grammar under which a call, once the model begins one, fits its tool; None where no tool is strict."""
    if calls.frame is None or not any(tool.function.strict for tool in tools):
        return None
    frame = calls.frame
    structures = [
        {
            "begin": f"{frame.begin}{json.dumps(tool.function.name, ensure_ascii=False)}{frame.middle}",
            "schema": parameters_schema(tool, index) if tool.function.strict else {"type": "object"},
            "end": frame.end,
        }
        for index, tool in enumerate(tools)
    ]
    return "structural_tag", json.dumps({"structures": structures, "triggers": [calls.opening]})
