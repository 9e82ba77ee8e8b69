"""JSON that stands between tags must not spell the closing tag in any of its strings: the tag would end the value."""

import re
from functools import cache
from typing import Any

Node = dict[str, Any]
ANY_VALUE = "any_value"
DECIDED = ("enum", "const", "$ref", "pattern", "format")  # whoever says this of a string says enough


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
    """The normalised schema of a value, whose strings and free keys do not spell the tag."""
    pattern = without(tag)
    root: Node = _node({key: value for key, value in schema.items() if key not in ("$defs", "x-guidance")}, pattern)
    definitions = {name: _node(node, pattern) for name, node in schema.get("$defs", {}).items()}
    definitions[ANY_VALUE] = any_value(pattern)
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


def _node(node: Any, pattern: str) -> Any:
    if node is True or node == {}:
        return {"$ref": f"#/$defs/{ANY_VALUE}"}
    if not isinstance(node, dict):
        return node
    out = dict(node)
    for key in ("properties", "patternProperties"):
        if key in node:
            out[key] = {name: _node(value, pattern) for name, value in node[key].items()}
    for key in ("allOf", "anyOf", "prefixItems"):
        if key in node:
            out[key] = [_node(value, pattern) for value in node[key]]
    for key in ("items", "additionalProperties"):
        if key in node:
            out[key] = _node(node[key], pattern)
    kinds = node.get("type", ())
    if "string" in ([kinds] if isinstance(kinds, str) else kinds) and not any(key in node for key in DECIDED):
        out["pattern"] = pattern
    if kinds == "array" and "items" not in node and "prefixItems" not in node:
        out["items"] = {"$ref": f"#/$defs/{ANY_VALUE}"}
    if kinds == "object" and not any(key in node for key in ("properties", "patternProperties")):
        value = out.pop("additionalProperties", {"$ref": f"#/$defs/{ANY_VALUE}"})
        out |= {"patternProperties": {pattern: value}, "additionalProperties": False}
    return out
