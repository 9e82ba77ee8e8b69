"""Calls whose parameters stand between tags: read however they are cut, and nothing is lost."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers import tool_calls
from quartet.http_gateway.parsers.call_formats import FORMATS
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.tagged_calls import json_value, kinds_of
from quartet.http_gateway.parsers.tool_events import Arguments, Content, Function, Tool, collect
from tests.unit.http_gateway.call_texts import WAYS

NAMES = [name for name, form in FORMATS.items() if form.tags is not None]
TYPES = {"s": "string", "t": "string", "i": "integer", "b": "boolean", "o": "object", "l": "array"}
SCHEMA = {"type": "object", "properties": {key: {"type": kind} for key, kind in TYPES.items()}}
TOOLS = [Tool(function=Function(name=name, parameters=SCHEMA)) for name in ("f", "get_weather", "Über")]


def reader(name):
    known, schemas = tool_calls.names_of(TOOLS), tool_calls.schemas_of(TOOLS)
    return OutputReader(calls=FORMATS[name], known=known, schemas=schemas)


def stream(name, pieces):
    reading = reader(name)
    events = [event for piece in pieces for event in reading.feed(piece)]
    return collect(events + reading.finish())[:2]


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def written(form, calls):
    return WAYS[form][0](calls)


TEXTS = st.text(max_size=20) | st.sampled_from(["\n", "\n\na\n", '"\\', "<", "</", "</parameter", "<tool_call>", "123"])
INNER = st.recursive(
    st.none() | st.booleans() | st.integers(-(10**12), 10**12) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
CALLS = st.lists(
    st.tuples(
        st.sampled_from([tool.function.name for tool in TOOLS]),
        st.fixed_dictionaries(
            {},
            optional={
                "s": TEXTS,
                "t": TEXTS,
                "i": st.integers(-(10**12), 10**12),
                "b": st.booleans(),
                "o": st.dictionaries(st.text(max_size=5), INNER, max_size=3),
                "l": st.lists(INNER, max_size=3),
            },
        ),
    ),
    min_size=1,
    max_size=4,
)
TAGS = (
    '<tool_call> </tool_call> <function= <minimax:tool_call> <invoke name="f"> f > </function> <parameter=s> <arg_key>'
)
HOSTILE = [*TAGS.split(), " ", "\n", "</invoke>", *(written(name, [("f", {"s": "x", "i": 3})]) for name in NAMES)]
PLACES = st.lists(st.integers(0, 10_000), max_size=30)


@settings(max_examples=200, deadline=None)
@given(name=st.sampled_from(NAMES), calls=CALLS, places=PLACES)
def test_what_a_template_prints_is_read_back_however_it_is_cut(name, calls, places):
    content, found = stream(name, cut("Well. " + written(name, calls) + " Then.", places))
    assert content == "Well. Then."
    assert [(call.name, json.loads(call.arguments)) for call in found] == calls


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    text=st.lists(
        st.sampled_from(HOSTILE) | st.text(max_size=6),
        max_size=8,
    ).map("".join),
    places=PLACES,
)
def test_no_cut_changes_what_hostile_text_means_and_nothing_is_lost(name, text, places):
    whole = stream(name, [text])
    assert stream(name, cut(text, places)) == whole
    if not whole[1]:
        assert whole[0] == text


@pytest.mark.parametrize("name", NAMES)
def test_text_streams_while_it_is_written(name):
    reading = reader(name)
    events = [event for character in written(name, [("f", {"s": "a" * 50})]) for event in reading.feed(character)]
    assert sum(isinstance(event, Arguments) for event in events) > 30


@pytest.mark.parametrize("name", NAMES)
def test_an_output_cut_inside_a_value_keeps_what_was_written(name):
    text = written(name, [("f", {"s": "so far"})])
    assert stream(name, [text[: text.index("far") + 3]]) == ("", [("f", '{"s": "so far')])
    text = written(name, [("f", {"l": [12, 34]})])
    assert stream(name, [text[: text.index("34") + 2]]) == ("", [("f", '{"l": "[12, 34')])


@pytest.mark.parametrize("name", NAMES)
def test_a_call_of_a_stranger_is_text(name):
    text = written(name, [("stranger", {"s": "x"})])
    assert stream(name, text) == (text, [])


@pytest.mark.parametrize("name", NAMES)
def test_a_forgotten_end_closes_the_call_and_what_follows_is_text(name):
    text = written(name, [("f", {"i": 3})])
    broken = text[: text.rindex(FORMATS[name].tags.end or FORMATS[name].closing)] + "so"
    content, calls = stream(name, [broken])
    assert (content.strip(), calls) == ("so", [("f", '{"i": 3}')])


@pytest.mark.parametrize("name", NAMES)
def test_long_outputs_of_many_calls_cost_what_they_are_long(name):
    calls = [("f", {"s": "x" * 100, "i": 1})] * 2000
    assert len(stream(name, [written(name, calls)])[1]) == 2000


@pytest.mark.parametrize("name", NAMES)
def test_blanks_between_tags_are_not_kept(name):
    """Kept, they would be looked through again with every piece."""
    tags = FORMATS[name].tags
    head = FORMATS[name].opening + tags.name_begin + "f" + (tags.name_end or "\n")
    behind_key = [head + tags.key_begin + "s" + tags.key_end] if tags.value_begin else []
    for begin in (head, *behind_key):
        reading = reader(name)
        for piece in [begin, *["\n"] * 100]:
            reading.feed(piece)
        assert reading._reading._call._buffer == "", begin


def test_plain_text_is_not_held_back():
    assert reader("qwen3_coder").feed("Hello <b") == [Content("Hello <b")]


@pytest.mark.parametrize(
    ("text", "kinds", "value"),
    [
        ("12", set(), 12),
        ("12", {"string", "null"}, "12"),
        ("null", {"string", "null"}, None),
        ("True", {"boolean"}, True),
        ("no json", {"integer"}, "no json"),
        ("[1", {"array"}, "[1"),
        ("['a', True, None]", {"array"}, ["a", True, None]),
        ("{'a': (1, 2)}", {"object", "null"}, {"a": [1, 2]}),
        ("['a']", {"string"}, "['a']"),
        ("f()", {"object"}, "f()"),
        ("[" * 500, {"array"}, "[" * 500),
        ('"12"', {"string", "null"}, '"12"'),
    ],
)
def test_a_value_has_the_type_that_its_schema_allows(text, kinds, value):
    assert json.loads(json_value(text, kinds)) == value


@pytest.mark.parametrize(
    ("schema", "kinds"),
    [
        ({"type": "string"}, {"string"}),
        ({"type": ["string", "null"]}, {"string", "null"}),
        ({"anyOf": [{"type": "string"}, {"type": "null"}]}, {"string", "null"}),
        ({"oneOf": [{"type": "integer"}, {"enum": ["a"]}]}, {"integer", "string"}),
        ({"enum": ["a", 1, None]}, {"string", "integer", "number", "null"}),
        ({"const": True}, {"boolean"}),
        ({"anyOf": [{"type": "string"}, {}]}, set()),
        ({"anyOf": []}, set()),
        ({}, set()),
        (True, set()),
        (None, set()),
    ],
)
def test_the_types_of_a_parameter_are_those_of_all_its_alternatives(schema, kinds):
    assert kinds_of(schema) == kinds


@pytest.mark.parametrize("name", NAMES)
def test_a_number_written_for_an_optional_text_stays_text(name):
    """As pydantic writes the schema of `str | None`."""
    optional = {"properties": {"s": {"anyOf": [{"type": "string"}, {"type": "null"}]}}}
    tools = [Tool(function=Function(name="f", parameters=optional))]
    for value, meant in (("12", "12"), (None, None)):
        [call] = tool_calls.parse(FORMATS[name], tools, written(name, [("f", {"s": value})])).calls
        assert json.loads(call.arguments) == {"s": meant}
