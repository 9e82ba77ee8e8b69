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


def grammar(wanted: ResponseFormat | None) -> tuple[str, str] | None:
    """(kind, text) as in SamplingParams.grammar, or None for free text. Raises RequestError."""
    if wanted is None or wanted.type == "text":
        return None
    if wanted.type == "structural_tag":
        return "structural_tag", _structural_tag(wanted)
    if wanted.type == "regex":
        if wanted.pattern is None:
            raise RequestError("pattern is required for regex response format request.", field="response_format")
        return "regex", wanted.pattern
    return "json_schema", as_json("response_format", _schema(wanted))


def _schema(wanted: ResponseFormat) -> dict[str, Any]:
    inner = wanted.json_schema.schema_ if wanted.json_schema else None
    schema = inner if inner is not None else wanted.schema_
    if schema is None and wanted.type == "json_schema":
        raise RequestError("schema_ is required for json_schema response format request.", field="response_format")
    return {"type": "object"} if schema is None else schema


def _structural_tag(wanted: ResponseFormat) -> str:
    if wanted.format is not None or wanted.structures is None or wanted.triggers is None:
        raise RequestError("structural_tag takes structures and triggers.", field="response_format")
    tag = {"type": "structural_tag", "structures": wanted.structures, "triggers": wanted.triggers}
    return as_json("response_format", tag)
