"""Lark for single values of a call's parameters: between tags, and in Python."""

import json
from typing import Any

from quartet.runtime.call_grammar import ValueTags
from quartet.scheduler_service.grammar.arguments import Parameter
from quartet.scheduler_service.grammar.lark import SpecialTokens, literal, split_at_tokens
from quartet.scheduler_service.grammar.text_values import ANY, nested, options, texts
from quartet.scheduler_service.grammar.without_tag import guarded

VALUE_RULES = (
    r'PYTHON_TEXT: /"([^"\\\x00-\x1F\x7F]|\\["\\nrt])*"/ | /\x27([^\x27\\\x00-\x1F\x7F]|\\[\x27\\nrt])*\x27/',
    'python_boolean: "True" | "False"',
)
PLAIN = {"type", "x-guidance", "$defs"}  # keywords that leave every value of a type


def python_value(schema: dict[str, Any]) -> str:
    """A value as a Python literal; where it is more than a scalar, JSON, which is read just as well."""
    if schema.keys() <= PLAIN:
        match schema.get("type"):
            case "string":
                return "PYTHON_TEXT"
            case "boolean":
                return "python_boolean"
            case "null":
                return '"None"'
    return f"%json {json.dumps(schema)}"


def tagged_value(
    name: str, parameter: Parameter, tags: ValueTags, raw: bool, special_tokens: SpecialTokens
) -> tuple[str, list[str]]:
    """A value and the tag behind it, and the rules that they need. `raw`: it is read as text, else as JSON."""
    schema = parameter.schema
    before, behind = split_end("\n" * tags.own_lines + tags.end, special_tokens)
    end = f"{literal(before, special_tokens)} {behind}"
    if not raw:
        return f"%json {json.dumps(guarded(schema, tags.end))} {end}", []
    alternatives = options(schema)
    terminal, whole = name.upper(), {key: schema[key] for key in ("$defs", "x-guidance") if key in schema}
    rules, found = list[str](), list[str]()
    if written := texts(alternatives, tags.end):
        text = " | ".join(f"({one})" for one in written)
        rules.append(f"{terminal}_TEXT: ({text}) & ~({ANY} {json.dumps(tags.end)} {ANY})")
        rules.append(f"{terminal}: {terminal}_TEXT {json.dumps(before) if before else ''}")
        found.append(f"{terminal} {behind}")
    found += [f"%json {json.dumps(guarded(node | whole, tags.end))} {end}" for node in nested(alternatives)]
    if not found:
        raise ValueError(f"no value of the parameter {parameter.name!r} can be written between tags")
    return "(" + " | ".join(found) + ")", rules


def split_end(end: str, special_tokens: SpecialTokens) -> tuple[str, str]:
    """A tag behind a value: its text up to the first special token, and the Lark of the rest."""
    first, *rest = split_at_tokens(end, special_tokens)
    if first in special_tokens:
        return "", literal(end, special_tokens)
    return first, literal("".join(rest), special_tokens)
