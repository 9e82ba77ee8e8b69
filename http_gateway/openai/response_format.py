"""What `response_format` of an OpenAI request asks for, as one of the native grammars; the same for vLLM's fields."""

import json
from collections.abc import Iterator
from typing import Any, Literal, Protocol

import msgspec

from quartet.runtime.errors import RequestError
from quartet.runtime.sampling import as_json

ANY_OBJECT = '{"type": "object"}'


class JsonSchema(msgspec.Struct):
    """The object under `json_schema`; `strict` is the only mode there is."""

    schema_: dict[str, Any] | None = msgspec.field(name="schema", default=None)
    name: str | None = None
    description: str | None = None
    strict: bool | None = None


class ResponseFormat(msgspec.Struct):
    """`response_format`, all kinds in one struct as they come."""

    type: Literal["text", "json_object", "json_schema", "structural_tag", "regex"]
    json_schema: JsonSchema | None = None
    schema_: dict[str, Any] | None = msgspec.field(name="schema", default=None)  # some clients put it here
    structures: list[dict[str, Any]] | None = None
    triggers: list[str] | None = None
    format: dict[str, Any] | None = None
    pattern: str | None = None


class StructuredOutputs(msgspec.Struct):
    """`structured_outputs` of vLLM: one of the first six."""

    json: str | dict[str, Any] | None = None
    regex: str | None = None
    choice: list[str] | None = None
    grammar: str | None = None
    json_object: bool | None = None
    structural_tag: str | dict[str, Any] | None = None
    # refused
    whitespace_pattern: str | None = None
    disable_any_whitespace: bool | None = None
    disable_additional_properties: bool | None = None


class VllmFields(Protocol):
    """The fields in which clients of vLLM say what the output must look like, of a body."""

    guided_json: str | dict[str, Any] | None
    guided_regex: str | None
    guided_choice: list[str] | None
    guided_grammar: str | None
    structured_outputs: StructuredOutputs | None


VLLM_FIELDS = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs")
VLLM_KINDS = {"json": "json_schema", "regex": "regex", "grammar": "ebnf", "structural_tag": "structural_tag"}
GIVEN_BY_KIND = ("json_schema", "regex", "ebnf", "structural_tag")  # fields that are named like the grammars' kinds
REFUSED_OPTIONS = ("whitespace_pattern", "disable_any_whitespace", "disable_additional_properties")


def field_of_grammar(body: Any) -> str:
    """The field of a body in which its client says what the output must look like: `tools` where no other does."""
    given = body.response_format
    if given is not None and given.type != "text":
        return "response_format"
    fields = (*VLLM_FIELDS, *GIVEN_BY_KIND)
    return next((name for name in fields if getattr(body, name, None) is not None), "tools")


def vllm_grammars(body: VllmFields) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each constraint in vLLM's fields: the field, and (kind, text). Raises RequestError."""
    for name in VLLM_FIELDS[:-1]:
        if (value := getattr(body, name)) is not None:
            yield name, _vllm_grammar(name, name.removeprefix("guided_"), value)
    options = body.structured_outputs
    if options is None:
        return
    for option in REFUSED_OPTIONS:
        if getattr(options, option):
            raise RequestError(f"structured_outputs.{option} is not supported.", field="structured_outputs")
    given = [name for name in (*VLLM_KINDS, "choice", "json_object") if getattr(options, name) not in (None, False)]
    if len(given) != 1:
        names = "json, regex, choice, grammar, json_object and structural_tag"
        raise RequestError(f"structured_outputs takes exactly one of {names}.", field="structured_outputs")
    yield "structured_outputs", _vllm_grammar("structured_outputs", given[0], getattr(options, given[0]))


def _vllm_grammar(field: str, name: str, value: Any) -> tuple[str, str]:
    match name:
        case "choice":
            return "ebnf", _one_of(field, value)
        case "json_object":
            return "json_schema", ANY_OBJECT
        case _:
            return VLLM_KINDS[name], value if isinstance(value, str) else as_json(field, value)


def _one_of(field: str, choices: list[str]) -> str:
    """The EBNF of one of several texts."""
    if not choices:
        raise RequestError(f"{field} needs at least one choice.", field=field)
    return "root ::= " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in choices)


def grammar(given: ResponseFormat | None) -> tuple[str, str] | None:
    """(kind, text) as in SamplingParams.grammar, or None for free text. Raises RequestError."""
    if given is None or given.type == "text":
        return None
    if given.type == "structural_tag":
        return "structural_tag", _structural_tag(given)
    if given.type == "regex":
        if given.pattern is None:
            raise RequestError("pattern is required for regex response format request.", field="response_format")
        return "regex", given.pattern
    return "json_schema", as_json("response_format", _schema(given))


def _schema(given: ResponseFormat) -> dict[str, Any]:
    inner = given.json_schema.schema_ if given.json_schema else None
    schema = inner if inner is not None else given.schema_
    if schema is None and given.type == "json_schema":
        raise RequestError("schema_ is required for json_schema response format request.", field="response_format")
    return json.loads(ANY_OBJECT) if schema is None else schema


def _structural_tag(given: ResponseFormat) -> str:
    """The current form, with a format, or the one before, with structures and triggers."""
    tag: dict[str, Any] = {"type": "structural_tag"}
    if given.format is not None and given.structures is None and given.triggers is None:
        tag["format"] = given.format
    elif given.format is None and given.structures is not None and given.triggers is not None:
        tag |= {"structures": given.structures, "triggers": given.triggers}
    else:
        raise RequestError("structural_tag takes a format, or structures and triggers.", field="response_format")
    return as_json("response_format", tag)
