"""Every format, in every way its models write it: what is written is read, however it is cut, and nothing is lost."""

import itertools
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers import tool_calls
from quartet.http_gateway.parsers.call_formats import FORMATS, REQUIRED
from quartet.http_gateway.parsers.channels import HARMONY
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.thoughts import ANALYSIS, Marks
from quartet.http_gateway.parsers.tool_events import Arguments, Function, Tool, collect
from tests.unit.http_gateway.call_texts import AT_THE_BEGINNING, WAYS

READ = FORMATS | {"required": REQUIRED}
CASES = [(name, way) for name, ways in WAYS.items() for way in ways]
IDS = [f"{name}-{way.__name__}" for name, way in CASES]
ANYWHERE = [(name, way) for name, way in CASES if way not in AT_THE_BEGINNING]
TYPES = {"s": "string", "t": "string", "i": "integer", "b": "boolean", "o": "object", "l": "array"}
SCHEMA = {"type": "object", "properties": {key: {"type": kind} for key, kind in TYPES.items()}}
TOOLS = [Tool(function=Function(name=name, parameters=SCHEMA)) for name in ("f", "get_weather", "Über")]
KNOWN, SCHEMAS = tool_calls.names_of(TOOLS), tool_calls.schemas_of(TOOLS)


def cut(text, places):
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    return [text[a:b] for a, b in itertools.pairwise(edges)]


def events_of(name, pieces, marks=None):
    reading = OutputReader(marks, calls=READ[name], known=KNOWN, schemas=SCHEMAS)
    return [event for piece in pieces for event in reading.feed(piece)] + reading.finish()


def read(name, pieces, marks=None):
    return collect(events_of(name, pieces, marks))


def around(name, before, calls, behind):
    """Calls and what is said beside them, in messages of their own where the format has such."""
    if name != "gpt-oss":
        return before + calls + behind
    said = f"<|channel|>commentary<|message|>{before}<|end|><|start|>assistant" if before else ""
    return f"{said}{calls}<|start|>assistant<|channel|>final<|message|>{behind}<|return|>"


TEXTS = st.text(max_size=20) | st.sampled_from(
    ["\n", "\n\na\n", '"\\', "<", "</", "```", "]", "}}", "<tool_call>", "12"]
)
INNER = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
ARGUMENTS = st.fixed_dictionaries(
    {},
    optional={
        "s": TEXTS,
        "t": TEXTS,
        "i": st.integers(-(10**12), 10**12),
        "b": st.booleans(),
        "o": st.dictionaries(st.text(max_size=5), INNER, max_size=3),
        "l": st.lists(INNER, max_size=3),
    },
)
CALLS = st.lists(st.tuples(st.sampled_from(KNOWN), ARGUMENTS), min_size=1, max_size=4)
PLACES = st.lists(st.integers(0, 10_000), max_size=30)
SAID = st.text(st.characters(exclude_categories=["C", "Z"], exclude_characters="[]{}<>`|;,\"'()"), min_size=1)


def test_every_format_has_its_ways_of_being_written():
    assert WAYS.keys() == READ.keys()


@pytest.mark.parametrize(("name", "way"), CASES, ids=IDS)
@settings(max_examples=40, deadline=None)
@given(calls=CALLS, before=SAID, behind=SAID, places=PLACES, data=st.data())
def test_what_a_model_writes_is_read_however_it_is_cut(name, way, calls, before, behind, places, data):
    before = "" if way in AT_THE_BEGINNING else data.draw(st.sampled_from(["", f"{before} ", f"{before}\n"]))
    text = around(name, before, way(calls), "\n" + behind)
    whole = read(name, cut(text, places))
    assert [(call.name, json.loads(call.arguments)) for call in whole.calls] == calls
    assert whole.content == before.rstrip() + "\n" * (name != "gpt-oss") + behind
    assert whole.thought == ""


@pytest.mark.parametrize(("name", "way"), [case for case in ANYWHERE if case[0] != "gpt-oss"])  # see test_channels
def test_text_between_calls_is_kept(name, way):
    one, two = way([("f", {"i": 1})]), way([("get_weather", {"s": "Zürich"})])
    for step in (1, 5, 1000):
        text = f"First.\n{one} Then. {two}\nDone."
        whole = read(name, [text[at : at + step] for at in range(0, len(text), step)])
        assert whole.content == "First. Then.\nDone."
        assert whole.calls == [("f", '{"i": 1}'), ("get_weather", '{"s": "Zürich"}')]


@pytest.mark.parametrize(("name", "way"), CASES, ids=IDS)
def test_every_single_cut_gives_the_same_calls(name, way):
    text = way([("f", {"i": 1, "l": [{"s": "}"}]}), ("get_weather", {"s": "Zürich 🎉 \"]}'"})])
    whole = read(name, [text])
    assert len(whole.calls) == 2 and whole.content == ""
    assert all(read(name, cut(text, [at])) == whole for at in range(len(text)))
    assert read(name, text) == whole


@pytest.mark.parametrize(("name", "way"), CASES, ids=IDS)
def test_arguments_stream_while_they_are_written(name, way):
    events = events_of(name, way([("f", {"s": "a" * 50}), ("get_weather", {})]))
    assert (events[0].index, events[0].name) == (0, "f")
    parts = sum(isinstance(event, Arguments) for event in events)
    assert parts > 50 or READ[name].body == "python", parts  # Python becomes JSON when its parenthesis closes


@pytest.mark.parametrize(("name", "way"), CASES, ids=IDS)
def test_an_output_that_ends_amid_a_call_loses_nothing_that_was_said(name, way):
    text = way([("f", {"s": "first word and LAST"})])
    for end in range(text.index("LAST"), text.index("LAST") + 5):
        whole = read(name, text[:end])
        said = whole.content + "".join(call.arguments for call in whole.calls)
        assert "first word and" in said and said.count("LAST"[: end - text.index("LAST")]) >= 1


@pytest.mark.parametrize(("name", "way"), CASES, ids=IDS)
def test_a_call_of_a_stranger_is_text_to_the_last_character(name, way):
    text = way([("stranger", {"s": "x"})])
    assert read(name, text) == (text, [], "")


@pytest.mark.parametrize(("name", "way"), [case for case in CASES if case[0] != "gpt-oss"])  # see test_channels
def test_a_call_in_an_unclosed_thought_is_a_part_of_the_thought(name, way):
    call = way([("f", {"i": 1})])
    assert read(name, f"<think>Maybe {call}", Marks()) == ("", [], f"Maybe {call}")
    behind = read(name, f"<think>Maybe {call} or not.</think>\n{call}", Marks())
    assert behind == ("", [("f", '{"i": 1}')], f"Maybe {call} or not.")


TAGS = sorted(
    {tag for form in READ.values() for tag in (*form.openings, form.closing) if tag}
    | {tag for form in READ.values() if form.head for tag in (form.head.begin, form.head.name_end, form.head.end)}
    | {tag for form in READ.values() if form.tags for tag in vars(form.tags).values() if isinstance(tag, str) and tag}
    | {
        *HARMONY.heads,
        *HARMONY.ends,
        "<|constrain|>",
        "assistant",
        "analysis",
        "commentary ",
        "to=functions.f",
        "final",
    }
    | {
        "<think>",
        "</think>",
        "functions.",
        "[ARGS]",
        "print(",
        "f(",
        "s=",
        "f",
        '{"name": "f", "arguments": {',
        '{"name":',
    }
    | {
        '"s": "',
        '"',
        "\\",
        "\\u12",
        "}}",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "'",
        ", ",
        ";",
        ":",
        "\n",
        " ",
        "日本🎉",
        "\x00",
    }
)
WRITTEN = [way(calls) for _, way in CASES for calls in ([("f", {"s": "x"})], [("f", {}), ("get_weather", {"i": 3})])]
PIECES = st.sampled_from(TAGS) | st.sampled_from(WRITTEN) | st.text(max_size=6)


@pytest.mark.parametrize("name", sorted(READ))
@settings(max_examples=60, deadline=None)
@given(pieces=st.lists(PIECES, max_size=8), places=PLACES, thinks=st.booleans())
def test_hostile_text_means_the_same_however_it_is_cut_and_no_word_is_lost(name, pieces, places, thinks):
    text = "".join(f"{piece}§{number}§" for number, piece in enumerate(pieces))
    marks = (ANALYSIS if name == "gpt-oss" else Marks()) if thinks else None
    whole = read(name, [text], marks)
    assert read(name, cut(text, places), marks) == whole
    if not whole.calls and not thinks and name != "gpt-oss":  # tags of messages are no text
        assert whole.content == text
    said = whole.content + whole.thought + "".join(call.arguments for call in whole.calls)
    if name != "required":  # the beginning of a call that is demanded is no answer
        assert set(re.findall(r"§\d+§", text)) == set(re.findall(r"§\d+§", said))


MOST_HELD = 600  # characters: the longest head of a call or a message, and a tag


def held(reading):
    """Characters that the next piece makes the reader look at again."""
    call = reading._reading and reading._reading._call
    return len(reading._held) + len(getattr(call, "_buffer", ""))


@pytest.mark.parametrize(("way", "name"), {way: name for name, way in CASES}.items())
def test_no_character_is_looked_at_more_often_than_a_constant(name, way):
    """So the cost is linear, however the text is cut. A call is cut at many places, and goes on with one thing only."""
    call = way([("f", {"s": "x", "i": 1})])
    for end in range(0, len(call), 9):
        for more in (" ", "x", "<", "\n", "{", "[", '"', "\\", "`", ":", call[:end], call[end - 3 : end + 1]):
            reading = OutputReader(Marks(), calls=READ[name], known=KNOWN, schemas=SCHEMAS)
            reading.feed(call[:end])
            most = 0
            for character in (more * 700)[:700]:
                reading.feed(character)
                most = max(most, held(reading))
            assert most <= MOST_HELD, (call[:end], more)
