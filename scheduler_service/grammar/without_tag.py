"""JSON that stands between tags must not spell the closing tag in any of its strings: the tag would end the value."""

import re
from functools import cache
from typing import Any

from quartet.scheduler_service.grammar.free_keys import other_keys, without_character

Node = dict[str, Any]
ANY_VALUE = "any_value"


@cache
def without(tag: str) -> str:
    """A regular expression for text without the tag, whose first character occurs in it once."""
    first, rest = tag[0], tag[1:]
    assert first not in rest, tag
    begun = re.escape(first)
    follows = f"(?:[^{begun}{re.escape(rest[-1])}][^{begun}]*)?"  # all but the last character stood there
    for character in reversed(rest[:-1]):
        one = re.escape(character)
        follows = f"(?:[^{begun}{one}][^{begun}]*|{one}{follows})?"
    return f"^[^{begun}]*(?:{begun}{follows})*$"


def guarded(schema: Node, tag: str) -> Node:
    """The normalised schema of a value, whose strings and free keys do not spell the tag.

    Raises ValueError where no value is left.
    """
    root: Node = _node({key: value for key, value in schema.items() if key not in ("$defs", "x-guidance")}, tag)
    definitions = {name: _node(node, tag) for name, node in schema.get("$defs", {}).items()}
    definitions[ANY_VALUE] = any_value(without(tag))
    return {**root, "$defs": definitions} | {key: schema[key] for key in ("x-guidance",) if key in schema}


def any_value(pattern: str) -> Node:
    """Any value with such strings and keys."""
    again = {"$ref": f"#/$defs/{ANY_VALUE}"}
    return {
        "anyOf": [
            {"type": ["null", "boolean", "number"]},
            {"type": "string", "pattern": pattern},
            {"type": "array", "items": again},
            {"type": "object", "patternProperties": {pattern: again}, "additionalProperties": False},
        ]
    }


def _node(node: Any, tag: str) -> Any:
    if node is True or node == {}:
        return {"$ref": f"#/$defs/{ANY_VALUE}"}
    if not isinstance(node, dict):
        return node
    out = _values(node, tag)
    if "properties" in node:
        out["properties"] = {name: _node(value, tag) for name, value in node["properties"].items()}
    if spelled := next((name for name in node.get("properties", ()) if tag in name), None):
        raise ValueError(f"the key {spelled!r} spells the closing tag")
    for key in ("allOf", "prefixItems"):
        if key in node:
            out[key] = [_node(value, tag) for value in node[key]]
    if "anyOf" in node:
        out["anyOf"] = _options(node["anyOf"], tag)
    if "items" in node:
        out["items"] = _node(node["items"], tag)
    if not node.keys() & {"enum", "const", "$ref"}:
        _guard_strings(node, out, tag)
        _guard_items(node, out)
        _guard_keys(node, out, tag)
    return out


def _allows(kind: str, node: Node) -> bool:
    """Whether a node without listed values takes values of a type, where its own branches do not say it."""
    kinds = node.get("type", ())
    if not kinds:
        return not node.keys() & {"anyOf", "allOf"}
    return kind in ([kinds] if isinstance(kinds, str) else kinds)


def _guard_strings(node: Node, out: Node, tag: str) -> None:
    if "pattern" in node or "format" in node:
        out["allOf"] = [*out.get("allOf", ()), {"pattern": without(tag)}]
    elif _allows("string", node):
        out["pattern"] = without(tag)


def _guard_items(node: Node, out: Node) -> None:
    if _allows("array", node) and "items" not in node:
        out["items"] = {"$ref": f"#/$defs/{ANY_VALUE}"}


def _guard_keys(node: Node, out: Node, tag: str) -> None:
    """Keys that are not declared. Beside patterns there are none but those that fit one."""
    patterns, others = node.get("patternProperties", {}), node.get("additionalProperties", True)
    if not (patterns or "additionalProperties" in node or _allows("object", node)):
        return
    free = {without_character(pattern, tag[0]): _node(value, tag) for pattern, value in patterns.items()}
    if not patterns and others is not False:
        names = node.get("properties", ())
        free = {other_keys(names, tag[0]) if names else without(tag): _node(others, tag)}
    out["additionalProperties"] = False
    if free:
        out["patternProperties"] = free


def _values(node: Node, tag: str) -> Node:
    """The node with those of its listed values that do not spell the tag."""
    out = dict(node)
    if "enum" in node:
        out["enum"] = [value for value in node["enum"] if not _spells(value, tag)]
    if out.get("enum") == [] or _spells(node.get("const"), tag):
        raise ValueError("every value that the schema lists spells the closing tag")
    return out


def _spells(value: Any, tag: str) -> bool:
    """Whether a string or a key anywhere in a value has the tag in it."""
    match value:
        case str():
            return tag in value
        case list():
            return any(_spells(item, tag) for item in value)
        case dict():
            return any(tag in key or _spells(item, tag) for key, item in value.items())
        case _:
            return False


def _options(nodes: list[Any], tag: str) -> list[Any]:
    """Those alternatives that have a value."""
    found, refused = [], ValueError("no alternative can be written")
    for node in nodes:
        try:
            found.append(_node(node, tag))
        except ValueError as error:
            refused = error
    if not found:
        raise refused
    return found
