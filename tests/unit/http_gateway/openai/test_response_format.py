"""`response_format` becomes one of the native grammars."""

import json

import msgspec
import pytest

from quartet.http_gateway.openai.response_format import ResponseFormat, grammar, vllm_grammars
from quartet.http_gateway.openai.types import CompletionBody
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
    for _ in range(100_000):  # Python 3.13 writes 5,000
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


def test_a_structural_tag_in_its_current_form_is_handed_on():
    form = {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}
    kind, text = wanted(type="structural_tag", format=form)
    assert kind == "structural_tag"
    assert json.loads(text) == {"type": "structural_tag", "format": form}


@pytest.mark.parametrize(
    "fields",
    [{}, {"structures": []}, {"triggers": []}, {"format": {}, "structures": []}, {"format": {}, "triggers": ["a"]}],
)
def test_a_structural_tag_in_no_form_or_two_is_refused(fields):
    with pytest.raises(RequestError, match="takes a format, or structures and triggers"):
        wanted(type="structural_tag", **fields)


def vllm(**fields):
    found = list(vllm_grammars(msgspec.convert({"prompt": "a", **fields}, CompletionBody)))
    assert all(name in fields for name, _ in found)
    return [constraint for _, constraint in found]


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("json", SCHEMA, ("json_schema", json.dumps(SCHEMA))),
        ("json", json.dumps(SCHEMA), ("json_schema", json.dumps(SCHEMA))),
        ("regex", "a+", ("regex", "a+")),
        ("grammar", 'root ::= "a"', ("ebnf", 'root ::= "a"')),
        ("choice", ["a", 'b"\n'], ("ebnf", 'root ::= "a" | "b\\"\\n"')),
    ],
)
def test_fields_of_vllm_are_other_names_for_the_native_grammars(name, value, expected):
    assert vllm(**{f"guided_{name}": value}) == [expected]
    assert vllm(structured_outputs={name: value}) == [expected]


def test_structured_outputs_takes_an_object_and_a_structural_tag_too():
    assert vllm(structured_outputs={"json_object": True}) == [("json_schema", '{"type": "object"}')]
    tag = {"format": {"type": "any_text"}}
    assert vllm(structured_outputs={"structural_tag": tag}) == [("structural_tag", json.dumps(tag))]
    assert vllm() == []


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"guided_choice": []}, "guided_choice needs at least one choice"),
        ({"structured_outputs": {"choice": []}}, "structured_outputs needs at least one choice"),
        ({"structured_outputs": {}}, "exactly one of"),
        ({"structured_outputs": {"regex": "a", "json": {}}}, "exactly one of"),
        ({"structured_outputs": {"regex": "a", "whitespace_pattern": " "}}, "whitespace_pattern is not supported"),
        ({"structured_outputs": {"json": {}, "disable_any_whitespace": True}}, "disable_any_whitespace"),
    ],
)
def test_what_vllm_takes_and_this_server_does_not_is_refused_by_name(fields, message):
    with pytest.raises(RequestError, match=message):
        vllm(**fields)


def test_a_regex_needs_its_pattern():
    assert wanted(type="regex", pattern="a+") == ("regex", "a+")
    with pytest.raises(RequestError, match="pattern"):
        wanted(type="regex")
