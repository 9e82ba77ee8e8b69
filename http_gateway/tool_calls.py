"""Finds tool calls in a model's output, piece by piece as it streams.

A parser turns text into events. The events of a whole output, joined, do not depend on where it was cut. What is no
well-formed call of a known tool stays content, to the last character; blanks beside a call belong to nobody and are
dropped. Once a call's name and the opening of its arguments are read it is announced, and what follows streams
through as it comes.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from http_gateway.json_calls import DIALECTS, JsonCalls
from http_gateway.pythonic_calls import PythonicCalls
from http_gateway.tool_events import Parsed, Parser, Tool, collect
from runtime.errors import RequestError

REQUIRED = "required"  # the parser of what `calls_schema` makes a model write

PARSERS: dict[str, Callable[[Iterable[str]], Parser]] = {
    "hermes": lambda known: JsonCalls(DIALECTS["hermes"], known),
    "llama3": lambda known: JsonCalls(DIALECTS["llama3"], known),
    "mistral": lambda known: JsonCalls(DIALECTS["mistral"], known),
    "pythonic": PythonicCalls,
    "qwen": lambda known: JsonCalls(DIALECTS["hermes"], known),
    "qwen25": lambda known: JsonCalls(DIALECTS["hermes"], known),
}


def parser(name: str, tools: Sequence[Tool]) -> Parser:
    """A parser by its `--tool-call-parser` name, or REQUIRED. Raises RequestError."""
    known = [tool.function.name for tool in tools]
    if name == REQUIRED:
        return JsonCalls(DIALECTS["required"], known)
    if name not in PARSERS:
        raise RequestError(
            f"Unsupported tool call parser {name!r}, use one of: {', '.join(PARSERS)}.", field="tool_call_parser"
        )
    return PARSERS[name](known)


def parse(name: str, tools: Sequence[Tool], text: str) -> Parsed:
    """Content and calls of a whole output."""
    reading = parser(name, tools)
    return collect([*reading.feed(text), *reading.finish()])


def calls_schema(tools: Sequence[Tool], name: str | None = None, parallel: bool = True) -> str:
    """JSON schema of the calls that `tool_choice` demands: any of the tools, or the named one. Raises RequestError."""
    if not tools:
        raise RequestError("Tools cannot be empty if tool choice is set to required.", field="tools")
    chosen = [tool for tool in tools if name in (None, tool.function.name)]
    if not chosen:
        raise RequestError(f"Tool '{name}' not found in tools list.", field="tool_choice")
    definitions: dict[str, dict[str, Any]] = {}
    schema: dict[str, Any] = {
        "type": "array",
        "minItems": 1,
        "items": {"anyOf": [_call_schema(tool, definitions) for tool in chosen]},
    }
    if name is not None or not parallel:
        schema["maxItems"] = 1
    return json.dumps(schema | definitions)


def _call_schema(tool: Tool, definitions: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """One call. Definitions that the parameters refer to by the schema's root move to that root."""
    parameters = dict(tool.function.parameters or {"type": "object"})
    for place in ("$defs", "definitions"):
        defined = parameters.pop(place, None) or {}
        if not isinstance(defined, dict):
            raise RequestError(f"{place} of the parameters of {tool.function.name} must be an object.", field="tools")
        for key, value in defined.items():
            if definitions.setdefault(place, {}).setdefault(key, value) != value:
                raise RequestError(f"two tools define {place}/{key} differently.", field="tools")
    return {
        "type": "object",
        "properties": {"name": {"const": tool.function.name}, "parameters": parameters},
        "required": ["name", "parameters"],
        "additionalProperties": False,
    }
