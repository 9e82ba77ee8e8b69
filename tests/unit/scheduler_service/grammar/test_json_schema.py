"""Schemas of clients: what a grammar made of one lets through is valid, declared, and nothing else is refused."""

import json
import random

import jsonschema
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from llguidance import LLMatcher, LLTokenizer

from quartet.http_gateway.parsers.tool_calls import calls_schema
from quartet.http_gateway.parsers.tool_events import Function, Tool
from quartet.scheduler_service.grammar.matchers import LIMITS
from quartet.scheduler_service.grammar.source import source

BYTES = LLTokenizer("byte")
PATIENCE = 80  # bytes, after which a walk takes the shortest way out
CLOSERS = b'"}]'


def compiled(schema):
    """The engine's matcher. Raises ValueError as the compiler does."""
    matcher = LLMatcher(BYTES, source("json_schema", json.dumps(schema), {}), log_level=0, limits=LIMITS)
    matcher.compute_bitmask()
    if matcher.is_error():
        raise ValueError(matcher.get_error())
    return matcher


def takes(schema, value):
    """Whether a value may be written under a schema, with its keys in this order."""
    matcher = compiled(schema)
    return matcher.consume_tokens(list(json.dumps(value).encode())) and matcher.is_accepting()


def written(schema, seed):
    """What a model that picks any allowed byte writes under a schema."""
    rng, matcher, out = random.Random(seed), compiled(schema), bytearray()
    while not matcher.is_stopped() and not (matcher.is_accepting() and (len(out) > PATIENCE or rng.random() < 0.2)):
        mask = np.frombuffer(matcher.compute_bitmask(), dtype=np.uint8)
        allowed = [byte for byte in np.flatnonzero(np.unpackbits(mask, bitorder="little")[:128]) if byte >= 32]
        ends = [byte for byte in allowed if byte in CLOSERS]
        byte = int(rng.choice(ends if ends and (len(out) > PATIENCE or rng.random() < 0.3) else allowed))
        assert matcher.consume_token(byte)
        out.append(byte)
        assert len(out) < 3000, out
    return json.loads(out)


def model(**properties):
    return {"type": "object", "properties": properties, "required": list(properties)}


INTEGER, STRING = {"type": "integer"}, {"type": "string"}
CAT, DOG = model(meows=INTEGER), model(barks=INTEGER)

CLOSED = {
    "object": (model(a=INTEGER), {"a": 1}),
    "nested": (model(a=model(b=INTEGER)), {"a": {"b": 1}}),
    "in an array": ({"type": "array", "items": model(b=INTEGER)}, [{"b": 1}]),
    "by reference": ({"$defs": {"A": model(b=INTEGER)}, **model(a={"$ref": "#/$defs/A"})}, {"a": {"b": 1}}),
    "reference at the root": ({"$defs": {"A": model(a=INTEGER)}, "$ref": "#/$defs/A"}, {"a": 1}),
    "all of": ({"allOf": [model(a=INTEGER), model(b=INTEGER)]}, {"a": 1, "b": 1}),
    "all of beside keys": (
        {**model(a=INTEGER), "allOf": [{"$ref": "#/$defs/B"}], "$defs": {"B": DOG}},
        {"a": 1, "barks": 1},
    ),
    "any of": ({"anyOf": [CAT, DOG]}, {"barks": 1}),
    "one of beside keys": ({**model(a=INTEGER), "oneOf": [CAT, DOG]}, {"a": 1, "barks": 1}),
    "any of with needs alone": (
        {
            "type": "object",
            "properties": {"a": INTEGER, "b": INTEGER},
            "anyOf": [{"required": ["a"]}, {"required": ["b"]}],
        },
        {"a": 1, "b": 1},
    ),
    "two choices": (
        {"allOf": [{"anyOf": [CAT, DOG]}, {"oneOf": [model(b=INTEGER), model(c=INTEGER)]}]},
        {"meows": 1, "b": 1},
    ),
    "any of and one of": ({"anyOf": [CAT, DOG], "oneOf": [model(b=INTEGER), model(c=INTEGER)]}, {"barks": 1, "c": 1}),
    "patterns": ({"type": "object", "patternProperties": {"^x_": INTEGER}}, {"x_1": 1}),
    "patterns in parts": ({"allOf": [{"patternProperties": {"^x_": INTEGER}}, model(a=INTEGER)]}, {"a": 1, "x_1": 1}),
    "no keys": ({"type": "object", "properties": {}}, {}),
    "unevaluated": ({"allOf": [model(a=INTEGER)], "unevaluatedProperties": False}, {"a": 1}),
    "or null": ({"anyOf": [model(a=INTEGER), {"type": "null"}]}, {"a": 1}),
}


@pytest.mark.parametrize("name", CLOSED)
def test_no_key_is_invented_where_keys_are_declared(name):
    schema, value = CLOSED[name]
    assert takes(schema, value)
    inner = value[0] if isinstance(value, list) else value
    deepest = next((item for item in inner.values() if isinstance(item, dict)), inner)
    deepest["undeclared"] = 1
    assert not takes(schema, value)


OPEN = {
    "explicit": {**model(a=INTEGER), "additionalProperties": True},
    "by a schema": {**model(a=INTEGER), "additionalProperties": INTEGER},
    "free": {"type": "object"},
    "anything": {},
    "in a part": {"allOf": [model(a=INTEGER), {"type": "object", "additionalProperties": True}]},
    "around a choice": {"anyOf": [model(a=INTEGER), DOG], "additionalProperties": True},
    "unevaluated": {**model(a=INTEGER), "unevaluatedProperties": True},
    "unevaluated by a schema": {**model(a=INTEGER), "unevaluatedProperties": INTEGER},
}


@pytest.mark.parametrize("name", OPEN)
def test_an_object_that_says_so_or_declares_nothing_stays_open(name):
    assert takes(OPEN[name], {"a": 1, "undeclared": 1})


def test_a_key_that_is_required_is_declared():
    assert takes({"type": "object", "properties": {"a": INTEGER}, "required": ["a", "b"]}, {"a": 1, "b": "any"})


def test_a_tuple_takes_no_further_items_unless_it_says_so():
    schema = {"type": "array", "prefixItems": [INTEGER]}
    assert takes(schema, [1]) and not takes(schema, [1, 2])
    assert takes({**schema, "items": True}, [1, 2])
    assert takes({"type": "array", "items": [INTEGER, STRING]}, [1, "x"])


def test_a_schema_that_contains_itself_is_closed_everywhere():
    node = {"type": "object", "properties": {"next": {"anyOf": [{"$ref": "#/$defs/N"}, {"type": "null"}]}}}
    schema = {"$defs": {"N": node}, "$ref": "#/$defs/N"}
    assert takes(schema, {"next": {"next": None}})
    assert not takes(schema, {"next": {"last": None}})
    assert takes({**node["properties"], **node, "properties": {"next": {"$ref": "#"}}}, {"next": {"next": {}}})


E3 = {"enum": [3]}
REFERENCES = {
    "to a property": ({"properties": {"x": E3, "y": {"$ref": "#/properties/x"}}}, {"x": 3, "y": 3}),
    "into nested definitions": (
        {"properties": {"x": {"$defs": {"E": E3}, "$ref": "#/properties/x/$defs/E"}}},
        {"x": 3},
    ),
    "under an $id": (
        {"$id": "https://example.org/a", "$defs": {"E": E3}, "properties": {"x": {"$ref": "#/$defs/E"}}},
        {"x": 3},
    ),
    "by an $id": (
        {
            "$defs": {"E": {"$id": "https://example.org/e", **E3}},
            "properties": {"x": {"$ref": "https://example.org/e"}},
        },
        {"x": 3},
    ),
    "by a relative $id": (
        {"$id": "https://example.org/a", "$defs": {"E": {"$id": "e", **E3}}, "properties": {"x": {"$ref": "e"}}},
        {"x": 3},
    ),
    "to an anchor": ({"$defs": {"E": {"$anchor": "e", **E3}}, "properties": {"x": {"$ref": "#e"}}}, {"x": 3}),
    "to escaped names": ({"$defs": {"a/b~c d": E3}, "properties": {"x": {"$ref": "#/$defs/a~1b~0c%20d"}}}, {"x": 3}),
    "to an item of a list": ({"properties": {"x": {"anyOf": [E3]}, "y": {"$ref": "#/properties/x/anyOf/0"}}}, {"y": 3}),
    "to definitions beside it": ({"properties": {"x": {"$defs": {"E": E3}, "$ref": "#/$defs/E"}}}, {"x": 3}),
    "to draft 7 definitions": ({"definitions": {"E": E3}, "properties": {"x": {"$ref": "#/definitions/E"}}}, {"x": 3}),
}


@pytest.mark.parametrize("name", REFERENCES)
@pytest.mark.parametrize("as_tool", [False, True], ids=["schema", "tool"])
def test_references_are_followed_in_a_schema_and_in_a_tool(name, as_tool):
    schema, value = REFERENCES[name]
    schema = {"type": "object", "additionalProperties": False, **schema}
    wrong = dict.fromkeys(value, 4)
    if as_tool:
        schema = json.loads(calls_schema([Tool(function=Function(name="f", parameters=schema))]))
        value, wrong = ([{"name": "f", "parameters": item}] for item in (value, wrong))
    assert takes(schema, value) and not takes(schema, wrong)


def test_definitions_of_tools_that_share_a_name_do_not_meet():
    def tool(name, kind):
        parameters = {**model(x={"$ref": "#/$defs/Item"}), "$defs": {"Item": {"type": kind}}}
        return Tool(function=Function(name=name, parameters=parameters))

    schema = json.loads(calls_schema([tool("f", "boolean"), tool("g", "null")]))
    assert takes(schema, [{"name": "f", "parameters": {"x": True}}, {"name": "g", "parameters": {"x": None}}])
    assert not takes(schema, [{"name": "f", "parameters": {"x": None}}])


ONE_OF = {
    "by reference": (
        {"$defs": {"Cat": CAT, "Dog": DOG}, "oneOf": [{"$ref": "#/$defs/Cat"}, {"$ref": "#/$defs/Dog"}]},
        {"barks": 1},
    ),
    "open objects": (
        {"oneOf": [{**CAT, "additionalProperties": True}, {**DOG, "additionalProperties": True}]},
        {"meows": 1},
    ),
    "ranges": ({"oneOf": [{"type": "integer", "maximum": 5}, {"type": "integer", "minimum": 3}]}, 9),
}


@pytest.mark.parametrize("name", ONE_OF)
def test_one_of_is_at_least_any_of(name):
    schema, value = ONE_OF[name]
    assert takes(schema, value)


HARMLESS = [
    {"type": "string", "format": "password"},
    {"type": "integer", "format": "int32"},
    {"type": "array", "uniqueItems": False},
    {"type": "array", "uniqueItems": True, "maxItems": 1},
    {"type": "string", "title": "t", "default": 1, "examples": [1], "x-own": {}, "contentEncoding": "base64"},
    {"propertyNames": {"type": "string"}, "type": "object"},
    {"dependentRequired": {}, "dependentSchemas": {}, "if": {}},
    {"contains": {"type": "integer"}, "minContains": 0},
    {**model(a=INTEGER), "minProperties": 1},
    {"type": "object", "properties": {"a": INTEGER, "b": INTEGER}, "maxProperties": 2},
    {"type": "integer", "minimum": 1, "exclusiveMinimum": True},
    {"$schema": "http://json-schema.org/draft-07/schema#", "$comment": "x", "type": "null"},
    {"$dynamicAnchor": "x", "type": "null"},
]


@pytest.mark.parametrize("schema", HARMLESS, ids=json.dumps)
def test_what_constrains_nothing_is_no_reason_to_refuse(schema):
    compiled(schema)


CONSTRAINING = {
    "not": {"not": {"type": "string"}},
    "if": {"if": {"required": ["a"]}, "then": {"required": ["b"]}},
    "uniqueItems": {"type": "array", "uniqueItems": True},
    "contains": {"type": "array", "contains": INTEGER},
    "propertyNames": {"type": "object", "propertyNames": {"maxLength": 3}},
    "dependentRequired": {"dependentRequired": {"a": ["b"]}},
    "dependentSchemas": {"dependentSchemas": {"a": {"required": ["b"]}}},
    "unevaluatedItems": {"allOf": [{"prefixItems": [INTEGER]}], "unevaluatedItems": False},
    "unevaluatedProperties": {"allOf": [CAT], "unevaluatedProperties": INTEGER},
    "$dynamicRef": {"$dynamicRef": "#x"},
    "minProperties": {"type": "object", "properties": {"a": INTEGER, "b": INTEGER, "c": INTEGER}, "minProperties": 2},
}


@pytest.mark.parametrize("keyword", CONSTRAINING)
def test_what_would_constrain_and_cannot_be_had_is_refused_by_its_name(keyword):
    for schema in (CONSTRAINING[keyword], model(inside=CONSTRAINING[keyword])):
        with pytest.raises(ValueError, match=r"min/maxProperties|" + keyword.replace("$", r"\$")):
            compiled(schema)


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"$ref": "https://example.org/other"}, "leads out of the schema"),
        ({"$ref": "#/$defs/None"}, "leads nowhere"),
        ({"$ref": "#none"}, "leads nowhere"),
        ({"$ref": 1}, "must be a string"),
        ({"properties": []}, "properties must be an object"),
        ({"properties": {"a": 1}}, "must be an object or a boolean"),
        ({"anyOf": {}}, "anyOf must be a list"),
        ({"required": "a"}, "required must be a list"),
        ({"prefixItems": {}}, "prefixItems must be a list"),
        ({"prefixItems": [{}], "minItems": "1"}, "minItems must be a whole number"),
        ({"required": ["a", 1]}, "required must be a list of strings"),
        ({"type": ["string", 1]}, "type must be a string or a list of strings"),
        ({"type": None}, "type must be a string or a list of strings"),
        ({"enum": None}, "enum must be a list"),
        ({"type": "number", "minimum": "0"}, "minimum must be a number"),
        ({"type": "number", "multipleOf": 0}, "multipleOf must be a number above 0"),
    ],
)
def test_a_schema_that_is_none_is_refused(schema, message):
    with pytest.raises(ValueError, match=message):
        compiled(schema)


def test_a_count_may_be_written_as_a_number_with_a_point():
    array = {"type": "array", "items": {"type": "string", "minLength": 1.0, "maxLength": 2.0}, "maxItems": 2.0}
    assert takes(array, ["a", "bc"])
    assert not any(takes(array, value) for value in ([""], ["abc"], ["a", "b", "c"]))
    assert takes({"type": "object", "properties": {"a": INTEGER}, "maxProperties": 1.0}, {"a": 1})
    for wrong in ({"type": "string", "minLength": 1.5}, {"type": "array", "minItems": -1.0}):
        with pytest.raises(ValueError, match="Expected positive integer"):
            compiled(wrong)


def test_keywords_that_are_null_and_a_format_that_is_no_text_constrain_nothing():
    assert takes({"type": "number", "minimum": None, "multipleOf": None}, -1.5)
    assert takes({"type": "string", "minLength": None, "maxLength": None, "format": []}, "abc")
    assert takes({"type": "array", "prefixItems": [INTEGER], "minItems": None}, [1])
    assert takes({"type": "object", "properties": None, "required": None}, {"a": 1})
    nothing_required = {"type": "object", "properties": {"a": INTEGER}, "required": None}
    assert takes(nothing_required, {}) and takes(nothing_required, {"a": 1})
    assert not takes(nothing_required, {"b": 1})


LEAVES = st.sampled_from(
    [
        *(INTEGER, STRING, {"type": "boolean"}, {"type": "null"}, {"enum": ["a", 1, None]}, {"const": "c"}, {}),
        *({"type": "integer", "minimum": -3, "maximum": 90}, {"type": "string", "maxLength": 3, "format": "phone"}),
        *({"$ref": "#/$defs/A"}, {"$ref": "#/$defs/B"}, {"type": "object"}, True),
    ]
)
KEYS = st.sampled_from(["a", "b", "c", "x_1"])


def objects(inner):
    return st.fixed_dictionaries(
        {"type": st.just("object")},
        optional={
            "properties": st.dictionaries(KEYS, inner, max_size=3),
            "required": st.lists(KEYS, max_size=2, unique=True),
            "additionalProperties": st.booleans() | inner,
            "patternProperties": st.just({"^x_": INTEGER}),
        },
    )


SCHEMAS = st.recursive(
    LEAVES | objects(LEAVES),
    lambda inner: (
        objects(inner)
        | st.fixed_dictionaries({"type": st.just("array"), "items": inner, "maxItems": st.integers(0, 2)})
        | st.builds(
            lambda key, parts: {key: parts},
            st.sampled_from(["anyOf", "oneOf", "allOf"]),
            st.lists(inner, min_size=1, max_size=3),
        )
        | st.builds(
            lambda whole, key, parts: {**whole, key: parts},
            objects(inner),
            st.sampled_from(["anyOf", "allOf"]),
            st.lists(objects(inner), min_size=1, max_size=2),
        )
        | st.builds(lambda item: {"type": "array", "prefixItems": [item, INTEGER]}, inner)
    ),
    max_leaves=8,
)
REASONS = (
    "Unsatisfiable",
    "not disjoint",
    "circular",
    "patternPropert",
    "no output",
    "is not supported",
    "recursion",
    "too",
)


def any_of(node):
    """The schema with `oneOf` read as `anyOf`."""
    if isinstance(node, list):
        return [any_of(item) for item in node]
    if not isinstance(node, dict):
        return node
    return {"anyOf" if key == "oneOf" else key: any_of(value) for key, value in node.items()}


@settings(max_examples=250, deadline=None)
@given(root=SCHEMAS, one=SCHEMAS, other=objects(LEAVES), seed=st.integers(0, 9))
def test_a_schema_gives_valid_output_or_is_refused_for_a_reason(root, one, other, seed):
    schema = {"allOf": [root], "$defs": {"A": one, "B": other}} if isinstance(root, bool) else root
    schema = {**schema, "$defs": {"A": one, "B": other}}
    try:
        value = written(schema, seed)
    except ValueError as error:
        assert any(reason in str(error) for reason in REASONS), error
        return
    jsonschema.Draft202012Validator(any_of(schema)).validate(value)
