"""The schemas of tools' parameters without prose: descriptions are for the model, not for the grammar of calls."""

from typing import Any

PROSE = ("title", "description", "$comment")
BY_NAME = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")  # schemas under names
LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
SINGLE = ("items", "additionalProperties", "additionalItems", "contains", "not", "if", "then", "else")
MAX_DEPTH = 64


def without_prose(schema: Any, depth: int = 0) -> Any:
    """The same schema without texts that constrain nothing. What no schema stands in (`const`, `default`) stays."""
    if not isinstance(schema, dict) or depth > MAX_DEPTH:
        return schema
    out = {key: value for key, value in schema.items() if not (key in PROSE and isinstance(value, str))}
    for key, value in out.items():
        if key in BY_NAME and isinstance(value, dict):
            out[key] = {name: without_prose(inner, depth + 1) for name, inner in value.items()}
        elif key in LISTS and isinstance(value, list):
            out[key] = [without_prose(inner, depth + 1) for inner in value]
        elif key in SINGLE:
            out[key] = without_prose(value, depth + 1)
    return out
