"""Lark for single values of a call's parameters: between tags, and in Python."""

import json
from typing import Any

from llguidance import regex_to_lark

from quartet.runtime.call_grammar import ValueTags
from quartet.scheduler_service.grammar.arguments import Parameter
from quartet.scheduler_service.grammar.lark import SpecialTokens, literal
from quartet.scheduler_service.grammar.regex_size import check_regex
from quartet.scheduler_service.grammar.without_tag import guarded

VALUE_RULES = (
    r'PYTHON_TEXT: /"([^"\\\x00-\x1F\x7F]|\\["\\nrt])*"/ | /\x27([^\x27\\\x00-\x1F\x7F]|\\[\x27\\nrt])*\x27/',
    'python_boolean: "True" | "False"',
)
ANY = r"/(.|\n)*/"
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
    schema, end = parameter.schema, literal("\n" * tags.own_lines + tags.end, special_tokens)
    if not raw:
        return f"%json {json.dumps(guarded(schema, tags.end))} {end}", []
    if (values := listed(schema)) is not None:
        texts = [text for value in values if (text := written(value, schema)) is not None and tags.end not in text]
        if not texts:
            raise ValueError(f"no value of the parameter {parameter.name!r} can be written between tags")
        return "(" + " | ".join(literal(text, {}) or '""' for text in texts) + f") {end}", []
    terminal = name.upper()
    body = f"{terminal}_TEXT: {ANY} & ~({ANY} {json.dumps(tags.end)} {ANY})"
    body += "".join(f" & {pattern}" for pattern in patterns(schema))
    if tags.end in special_tokens:
        return f"{terminal}_TEXT {end}", [body]
    return terminal, [body, f"{terminal}: {terminal}_TEXT {json.dumps(chr(10) * tags.own_lines + tags.end)}"]


def listed(schema: dict[str, Any]) -> list[Any] | None:
    """The only values that a schema allows, where it lists them."""
    if "const" in schema:
        return [schema["const"]]
    if isinstance(schema.get("enum"), list):
        return list(schema["enum"])
    return None


def written(value: Any, schema: dict[str, Any]) -> str | None:
    """A value as text; None where the text would be read as another value."""
    if not isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)
    if schema.get("type") == "string":
        return value
    try:
        return value if isinstance(json.loads(value), str) else None
    except ValueError:
        return value


def patterns(schema: dict[str, Any]) -> list[str]:
    """Terminals that a text of this schema must match too. Formats do not constrain text."""
    found = []
    if isinstance(pattern := schema.get("pattern"), str):
        opened, closed = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
        inner = pattern[opened : len(pattern) - closed]
        found.append(" ".join(filter(None, ("" if opened else ANY, f"/({lark_regex(inner)})/", "" if closed else ANY))))
        found[-1] = f"({found[-1]})"
    least, most = schema.get("minLength", 0), schema.get("maxLength", "")
    if least or most != "":
        check_regex(f"x{{{least},{most}}}")
        found.append(rf"/(.|\n){{{least},{most}}}/")
    return found


def lark_regex(pattern: str) -> str:
    return str(regex_to_lark(pattern, "dws"))
