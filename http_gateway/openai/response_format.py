"""What `response_format` of an OpenAI request asks for, as one of the native grammars."""

from typing import Any, Literal

import msgspec

from quartet.runtime.errors import RequestError
from quartet.runtime.sampling import as_json


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
    return {"type": "object"} if schema is None else schema


def _structural_tag(given: ResponseFormat) -> str:
    if given.format is not None or given.structures is None or given.triggers is None:
        raise RequestError("structural_tag takes structures and triggers.", field="response_format")
    tag = {"type": "structural_tag", "structures": given.structures, "triggers": given.triggers}
    return as_json("response_format", tag)
