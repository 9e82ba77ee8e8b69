"""`response_format` becomes one of the native grammars."""

import json

import msgspec
import pytest

from quartet.http_gateway.openai.response_format import ResponseFormat, grammar
from quartet.runtime import sampling
from quartet.runtime.errors import RequestError

SCHEMA = {"type": "object", "properties": {"a": {"type": "integer"}}}


def wanted(**fields):
    return grammar(msgspec.convert(fields, ResponseFormat))


def test_text_is_free():
    assert grammar(None) is None
    assert wanted(type="text") is None


def test_a_json_object_is_any_object_unless_a_schema_is_given():
    assert wanted(type="json_object") == ("json_schema", '{"type": "object"}')
    assert wanted(type="json_object", schema=SCHEMA) == ("json_schema", json.dumps(SCHEMA))


def test_a_json_schema_stands_in_either_place():
    nested = {"name": "n", "schema": SCHEMA, "strict": True}
    assert wanted(type="json_schema", json_schema=nested) == ("json_schema", json.dumps(SCHEMA))
    assert wanted(type="json_schema", schema=SCHEMA) == ("json_schema", json.dumps(SCHEMA))


def test_a_schema_too_deep_to_be_written_is_refused():
    deep = {}
    for _ in range(5000):
        deep = {"items": deep}
    for given in (
        ResponseFormat("json_schema", schema_=deep),
        ResponseFormat("structural_tag", structures=[deep], triggers=["a"]),
    ):
        with pytest.raises(RequestError, match="response_format is nested too deeply"):
            grammar(given)
    with pytest.raises(RequestError, match="json_schema is nested too deeply"):
        sampling.read_params({"json_schema": deep})


def test_a_json_schema_without_schema_is_refused():
    for fields in ({}, {"json_schema": {"name": "n"}}):
        with pytest.raises(RequestError, match="schema_ is required for json_schema response format request"):
            wanted(type="json_schema", **fields)


def test_a_structural_tag_is_handed_on():
    structures = [{"begin": "<f>", "schema": SCHEMA, "end": "</f>"}]
    kind, text = wanted(type="structural_tag", structures=structures, triggers=["<f"])
    assert kind == "structural_tag"
    assert json.loads(text) == {"type": "structural_tag", "structures": structures, "triggers": ["<f"]}


def test_a_structural_tag_in_the_other_format_is_refused():
    with pytest.raises(RequestError, match="structures and triggers"):
        wanted(type="structural_tag", format={"type": "tag"})


def test_a_regex_needs_its_pattern():
    assert wanted(type="regex", pattern="a+") == ("regex", "a+")
    with pytest.raises(RequestError, match="pattern"):
        wanted(type="regex")
