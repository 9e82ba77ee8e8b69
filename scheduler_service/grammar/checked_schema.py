"""The JSON schema of a client, checked and with our options in it.

The engine limits its own work, except where a counted repetition is unrolled and where a schema is large.
"""

from typing import Any

import msgspec

from quartet.runtime import limits
from quartet.scheduler_service.grammar.json_schema import normalized
from quartet.scheduler_service.grammar.regex_size import check_regex

# Bounded, so that a model cannot fill its answer with blanks; wide enough for indented output.
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "lenient": False}
# Where no schema says what comes next, models would rather write blanks: a few, or a line break and an indentation.
ANY_OBJECT = {"type": "object"}
ANY_OBJECT_OPTIONS = {**JSON_OPTIONS, "whitespace_pattern": r"(\x0A[\x20\x09]{0,16}|\x20{0,2})"}


def checked_schema(text: str) -> dict[str, Any]:
    """The schema for the engine, with our options in it and its size and patterns checked."""
    try:
        schema = msgspec.json.decode(text)
    except RecursionError as error:
        raise ValueError("the schema is nested too deeply") from error
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    _check_size(schema)
    options = ANY_OBJECT_OPTIONS if schema == ANY_OBJECT else JSON_OPTIONS
    return {**normalized(schema), "x-guidance": options}


def _check_size(schema: dict[str, Any]) -> None:
    """Raise ValueError for too many nodes, or a pattern that unrolls to too many states."""
    nodes = 0
    to_visit: list[Any] = [schema]
    while to_visit:
        node = to_visit.pop()
        nodes += 1
        if nodes > limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"the schema has more than {limits.MAX_GRAMMAR_NODES} nodes")
        if isinstance(node, dict):
            _check_patterns(node)
            to_visit += node.values()
        elif isinstance(node, list):
            to_visit += node


def _check_patterns(node: dict[str, Any]) -> None:
    if isinstance(node.get("pattern"), str):
        check_regex(node["pattern"])
    if isinstance(node.get("patternProperties"), dict):
        for pattern in node["patternProperties"]:
            check_regex(pattern)
