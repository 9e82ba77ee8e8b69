"""Lark for values that stand as plain text, where a schema with alternatives says what they may be.

A text that reads as JSON of another type that the schema names is a value of that type, else it is a string. Formats
such as `date` do not constrain text. Every function raises ValueError.
"""

import json
import re
from typing import Any

from llguidance import regex_to_lark

from quartet.scheduler_service.grammar.arguments import Node
from quartet.scheduler_service.grammar.json_schema import NUMBERS
from quartet.scheduler_service.grammar.regex_size import check_regex

MAX_ALTERNATIVES = 512
MAX_DEPTH = 16
MAX_LISTED_NUMBERS = 1024
COMBINED = ("$ref", "allOf", "anyOf", "$defs", "x-guidance")
ANY = r"/(.|\n)*/"
INTEGER = r"-?(0|[1-9][0-9]*)"
NUMBER = rf"{INTEGER}(\.[0-9]+)?([eE][\-+]?[0-9]+)?"
BLANKS = r"[\s\x1c-\x1f]*"  # what the reader strips
READ_AS = {  # type → texts that are taken as values of this type
    "integer": rf"{BLANKS}{NUMBER}{BLANKS}",
    "number": rf"{BLANKS}{NUMBER}{BLANKS}",
    "boolean": rf"{BLANKS}([tT]rue|[fF]alse){BLANKS}",
    "null": rf"{BLANKS}null{BLANKS}",
    "array": rf"{BLANKS}[\[{{](.|\n)*",
    "object": rf"{BLANKS}[\[{{](.|\n)*",
}
TYPES = ("string", *READ_AS)

Option = list[Node]  # schemas without combinations that must hold together


def options(schema: Node) -> list[Option]:
    """The alternatives of a normalised schema."""
    return _options(schema, schema.get("$defs", {}), 0)


def _options(node: Any, definitions: Node, depth: int) -> list[Option]:
    if depth > MAX_DEPTH:
        raise ValueError("the schema is nested too deeply")
    if isinstance(node, bool):
        return [[]] if node else []
    found: list[Option] = [[{key: value for key, value in node.items() if key not in COMBINED}]]
    groups = [[part] for part in node.get("allOf", ())]
    if "anyOf" in node:
        groups.append(node["anyOf"])
    if "$ref" in node:
        groups.append([definitions.get(str(node["$ref"]).removeprefix("#/$defs/"))])
    for group in groups:
        branches = [option for branch in group for option in _options(branch, definitions, depth + 1)]
        if len(found) * len(branches) > MAX_ALTERNATIVES:
            raise ValueError(f"the schema has more than {MAX_ALTERNATIVES} alternatives")
        found = [[*one, *other] for one in found for other in branches]
    return [option for option in found if not any("not" in node for node in option)]


def named_types(alternatives: list[Option]) -> set[str]:
    """The types, but string, that a schema names: those that text may be read as."""
    found = set[str]()
    for node in (node for option in alternatives for node in option):
        kinds = node.get("type", ())
        found |= {kinds} if isinstance(kinds, str) else set(kinds)
        found |= {type_of(value) for value in _listed([node]) or ()}
    return found & READ_AS.keys()


def texts(alternatives: list[Option], without: str) -> list[str]:
    """Expressions for the texts that stand for the strings, numbers, booleans and nulls of these alternatives.

    `without`: what no text has in it. Empty where there is no such value.
    """
    others = named_types(alternatives)
    found = [text for option in alternatives for text in _texts(option, others, without)]
    return list(dict.fromkeys(found))


def nested(alternatives: list[Option]) -> list[Node]:
    """The schemas of the arrays and objects among the alternatives."""
    others, found = named_types(alternatives), list[Node]()
    for option in alternatives:
        kinds = [kind for kind in ("array", "object") if kind in _types(option) & others]
        if (values := _listed(option)) is not None:
            values = [value for value in values if type_of(value) in kinds]
            found += [{"enum": values}] if values else []
            continue
        parts = [node for node in option if node.keys() - {"type"}]
        whole = {"allOf": parts} if len(parts) > 1 else dict(*parts)
        found += [{**whole, "type": kind} for kind in kinds]
    return found


def type_of(value: Any) -> str:
    """The JSON type of a value."""
    match value:
        case None:
            return "null"
        case bool():
            return "boolean"
        case str():
            return "string"
        case int():
            return "integer"
        case float():
            return "integer" if value.is_integer() else "number"
    return "array" if isinstance(value, list) else "object"


def _types(option: Option) -> set[str]:
    """The types that all schemas of an alternative allow."""
    found = set(TYPES)
    for node in option:
        if "type" in node:
            kinds = {node["type"]} if isinstance(node["type"], str) else set(node["type"])
            found &= kinds | ({"integer"} if "number" in kinds else set())
    return found


def _listed(option: Option) -> list[Any] | None:
    """The only values that an alternative allows, where it lists them."""
    lists = [[node["const"]] for node in option if "const" in node]
    lists += [node["enum"] for node in option if isinstance(node.get("enum"), list)]
    if not lists:
        return None
    encoded = [{json.dumps(value, sort_keys=True) for value in values} for values in lists[1:]]
    return [value for value in lists[0] if all(json.dumps(value, sort_keys=True) in other for other in encoded)]


def _texts(option: Option, others: set[str], without: str) -> list[str]:
    kinds, values = _types(option), _listed(option)
    found = []
    if values is not None:
        values = [value for value in values if type_of(value) in kinds]
        scalars = [value for value in values if not isinstance(value, str | list | dict)]
        found += [json.dumps(json.dumps(value)) for value in scalars if _in_bounds(value, option)]
        strings = [value for value in values if isinstance(value, str) and without not in value]
        strings = [value for value in strings if not any(re.fullmatch(READ_AS[kind], value) for kind in others)]
        strings = [value for value in strings if all(least <= len(value) <= most for least, most in _lengths(option))]
        if strings:
            found.append(_string(option, " | ".join(map(json.dumps, dict.fromkeys(strings))), set()))
        return found
    if "string" in kinds:
        found.append(_string(option, ANY, others))
    if "null" in kinds & others:
        found.append('"null"')
    if "boolean" in kinds & others:
        found.append('"true" | "false"')
    if number := ("number" if "number" in kinds & others else "integer" if "integer" in kinds & others else ""):
        found += _number(option, number)
    return found


def _string(option: Option, text: str, others: set[str]) -> str:
    """A string: what it is made of, the patterns and lengths that it fits, what it must not be read as."""
    parts = [f"({text})", *patterns(option)]
    parts += [f"~/{READ_AS[kind]}/" for kind in sorted(others)]
    return " & ".join(dict.fromkeys(parts))


def patterns(option: Option) -> list[str]:
    """Expressions that a string of this alternative must match too."""
    found = []
    for node in option:
        if isinstance(pattern := node.get("pattern"), str):
            opened, closed = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
            inner = f"/({regex_to_lark(pattern[opened : len(pattern) - closed], 'dws')})/"
            found.append(f"({' '.join(filter(None, ('' if opened else ANY, inner, '' if closed else ANY)))})")
    for least, most in _lengths(option):
        if least or most != float("inf"):
            bounds = f"{{{least},{'' if most == float('inf') else most}}}"
            check_regex(f"x{bounds}")
            found.append(rf"/(.|\n){bounds}/")
    return found


def _lengths(option: Option) -> list[tuple[int, float]]:
    """The least and the greatest length of a string, once for each schema. The greatest may be infinite."""
    found = []
    for node in option:
        least, most = (_length(node, key) for key in ("minLength", "maxLength"))
        if least is not None and most is not None and least > most:
            raise ValueError(f"minLength is greater than maxLength: {least}, {most}")
        found.append((least or 0, float("inf") if most is None else most))
    return found


def _length(node: Node, keyword: str) -> int | None:
    value = node.get(keyword)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float) or value < 0 or value != int(value):
        raise ValueError(f"{keyword} must be a whole number, 0 or more, got {value!r}")
    return int(value)


def _number(option: Option, kind: str) -> list[str]:
    """A number. Where it has bounds, those that can be listed: others are not written."""
    if not any(key in node for node in option for key in NUMBERS):
        return [f"/{INTEGER if kind == 'integer' else NUMBER}/"]
    least = [node[key] for node in option for key in ("minimum", "exclusiveMinimum") if key in node]
    most = [node[key] for node in option for key in ("maximum", "exclusiveMaximum") if key in node]
    if not least or not most or max(least) < -(2**53) or min(most) > 2**53:
        return []
    values = range(int(max(least)) - 1, int(min(most)) + 2)
    if len(values) > MAX_LISTED_NUMBERS:
        return []
    fitting = [json.dumps(str(value)) for value in values if _in_bounds(value, option)]
    return [" | ".join(fitting)] if fitting else []


def _in_bounds(value: Any, option: Option) -> bool:
    """Whether a number, or what is none, fits the bounds of an alternative."""
    if value is None or isinstance(value, bool):
        return True
    return all(
        value >= node.get("minimum", value)
        and value <= node.get("maximum", value)
        and ("exclusiveMinimum" not in node or value > node["exclusiveMinimum"])
        and ("exclusiveMaximum" not in node or value < node["exclusiveMaximum"])
        and ("multipleOf" not in node or value % node["multipleOf"] == 0)
        for node in option
    )
