"""JSON that stands between tags must not spell the closing tag in any of its strings: the tag would end the value."""

import re
from functools import cache
from typing import Any

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
    out, pattern = _values(node, tag), without(tag)
    for key in ("properties", "patternProperties"):
        if key in node:
            out[key] = {name: _node(value, tag) for name, value in node[key].items()}
    if spelled := next((name for name in node.get("properties", ()) if tag in name), None):
        raise ValueError(f"the key {spelled!r} spells the closing tag")
    for key in ("allOf", "prefixItems"):
        if key in node:
            out[key] = [_node(value, tag) for value in node[key]]
    if "anyOf" in node:
        out["anyOf"] = _options(node["anyOf"], tag)
    for key in ("items", "additionalProperties"):
        if key in node:
            out[key] = _node(node[key], tag)
    kinds = node.get("type", ())
    if "pattern" in node or "format" in node:
        out["allOf"] = [*out.get("allOf", ()), {"pattern": pattern}]
    elif "string" in ([kinds] if isinstance(kinds, str) else kinds) and not node.keys() & {"enum", "const", "$ref"}:
        out["pattern"] = pattern
    if kinds == "array" and "items" not in node and "prefixItems" not in node:
        out["items"] = {"$ref": f"#/$defs/{ANY_VALUE}"}
    if kinds == "object" and not any(key in node for key in ("properties", "patternProperties")):
        value = out.pop("additionalProperties", {"$ref": f"#/$defs/{ANY_VALUE}"})
        out |= {"patternProperties": {pattern: value}, "additionalProperties": False}
    return out


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
