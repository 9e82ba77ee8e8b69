"""Harmony, the messages of gpt-oss: thoughts, remarks, calls and the answer, in both orders of their heads."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers.call_formats import FORMATS, REQUIRED
from quartet.http_gateway.parsers.channels import MAX_HEAD_CHARS, read_head
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.thoughts import ANALYSIS, Marks
from quartet.http_gateway.parsers.tool_events import Arguments, CallStart, Content, Thought, collect

KNOWN = ["f", "get_weather"]
CALL = '<|channel|>commentary to=functions.f <|constrain|>json<|message|>{"a": 1}<|call|>'


def read(pieces, marks=ANALYSIS, place="before", calls=FORMATS["gpt-oss"]):
    reading = OutputReader(marks, place, calls, KNOWN)
    return collect([event for piece in pieces for event in reading.feed(piece)] + reading.finish())


@pytest.mark.parametrize(
    ("text", "thought", "content"),
    [
        (
            "<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>",
            "Sum.",
            "4",
        ),
        ("<|channel|>analysis<|message|>Sum.<|end|><|start|>assistant<|channel|>final<|message|>4", "Sum.", "4"),
        ("<|channel|>final<|message|>4", "", "4"),
        ("<|channel|>analysis<|message|>never ended ", "never ended", ""),
        ("<|start|>assistant<|channel|>final<|message|>4<|end|>", "", "4"),
        ("<|message|>4", "", "4"),
        ("no head at all", "", "no head at all"),
        ("to=be or not", "", "to=be or not"),
        (
            "<|channel|>commentary<|message|>I look.<|end|><|start|>assistant<|channel|>final<|message|>4",
            "",
            "I look.\n4",
        ),
        (
            "<|channel|>analysis<|message|>one<|end|><|start|>assistant<|channel|>analysis<|message|>two<|end|>",
            "one\ntwo",
            "",
        ),
        ("<|channel|>final <|constrain|>json<|message|>{}<|return|>", "", "{}"),
        ("<|channel|>", "", "<|channel|>"),
        ("<|start|>user<|message|>x<|end|>", "", "<|start|>user\nx"),
    ],
)
def test_each_channel_goes_to_its_place(text, thought, content):
    for pieces in ([text], text):
        assert read(pieces) == (content, [], thought)


@pytest.mark.parametrize(
    "head",
    [
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f<|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f json<|message|>",
        "<|channel|>commentary to=functions.f<|message|>",
        "<|channel|>commentary to=f <|constrain|>json<|message|>",
        "<|channel|>analysis to=functions.f code<|message|>",
        " to=functions.f<|channel|>commentary json<|message|>",
        "to=functions.f<|channel|>commentary <|constrain|>json<|message|>",
        "<|start|>assistant to=functions.f<|channel|>commentary json<|message|>",
        "<|start|>assistant<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
    ],
)
@pytest.mark.parametrize("end", ["<|call|>", "<|end|>", ""])
def test_a_call_is_read_whatever_the_order_of_its_head(head, end):
    text = head + '{"a": {"b": "ü}"}}' + end
    whole = read([text])
    assert whole == ("", [("f", '{"a": {"b": "ü}"}}')], "")
    assert read(text) == whole


def test_thought_remark_calls_and_answer_in_one_output():
    text = (
        "<|channel|>analysis<|message|>Weather?<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
        f"<|start|>assistant{CALL}<|start|>assistant to=functions.get_weather<|channel|>commentary json<|message|>{{}}"
        "<|call|><|start|>assistant<|channel|>analysis<|message|>Rain.<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It rains.<|return|>"
    )
    whole = read([text])
    assert whole == ("I look.It rains.", [("f", '{"a": 1}'), ("get_weather", "{}")], "Weather?Rain.")
    assert all(read([text[:at], text[at:]]) == whole for at in range(len(text)))


def test_a_call_without_arguments_is_a_call():
    assert read(["<|channel|>commentary to=functions.f<|message|> <|call|>"]) == ("", [("f", "{}")], "")


@pytest.mark.parametrize(
    "text",
    [
        "<|channel|>commentary to=functions.stranger <|constrain|>json<|message|>{}<|call|>",
        "<|channel|>analysis to=browser.search code<|message|>{}<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>[1]<|call|>",
        "<|channel|>commentary to=functions.f <|constrain|>json<|message|>",
        "<|channel|>commentary to=functions.f <|constr",
        "<|start|>functions.f to=assistant<|channel|>commentary",
    ],
)
def test_what_is_no_call_stays_as_it_is_written(text):
    assert read([text]) == (text, [], "")
    assert read(text) == (text, [], "")


def test_what_looks_like_a_call_in_a_thought_is_a_part_of_it():
    text = f"<|channel|>analysis<|message|>I could write <|start|>assistant{CALL.removesuffix('<|call|>')}"
    thought = text.removeprefix("<|channel|>analysis<|message|>")
    assert read([text]) == ("", [], thought)
    assert read(text + "<|end|><|start|>assistant<|channel|>final<|message|>No.") == ("No.", [], thought)


def test_a_thought_that_the_prompt_has_opened_ends_with_its_message():
    text = "so<|end|><|start|>assistant<|channel|>final<|message|>4"
    assert read([text], place="inside") == ("4", [], "so")
    assert read(["4 it is<|return|>"], place="past") == ("4 it is", [], "")


def test_without_a_reasoning_parser_the_thought_stays_in_the_content_with_its_tags():
    thought = "<|channel|>analysis<|message|>Sum.<|end|>"
    assert read([f"{thought}<|start|>assistant{CALL}"], marks=None) == (thought, [("f", '{"a": 1}')], "")


def test_demanded_calls_may_stand_in_the_answer():
    calls = '[{"name": "f", "parameters": {}}]<|return|>'
    heads = "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>"
    assert read([heads + calls], calls=REQUIRED) == ("", [("f", "{}")], "x")
    assert read([calls], calls=REQUIRED) == ("", [("f", "{}")], "")


def test_thought_arguments_and_answer_stream():
    reading = OutputReader(ANALYSIS, "before", FORMATS["gpt-oss"], KNOWN)
    assert reading.feed("<|channel|>analysis<|mess") == []
    assert reading.feed("age|>I am") == [Thought("I am")]
    assert reading.feed("<|end|><|start|>assistant" + CALL[: CALL.index("1")]) == [
        CallStart(0, "f"),
        Arguments(0, "{"),
        Arguments(0, '"'),
        Arguments(0, "a"),
        Arguments(0, '"'),
        Arguments(0, ":"),
        Arguments(0, " "),
    ]
    reading.feed(CALL[CALL.index("1") :])
    assert reading.feed("<|start|>assistant<|channel|>final<|message|>It is") == [Content("It is")]


def test_text_that_only_begins_like_a_head_is_not_held_back_for_long():
    assert read_head("<|channel|>final", 0) is None
    assert read_head("to=be, or not", 0).end == 0
    assert read_head("<|channel|>" + "a" * MAX_HEAD_CHARS, 0).end == 0


SAID = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="<"), max_size=12)
MESSAGES = st.lists(
    st.tuples(st.just("analysis"), SAID)
    | st.tuples(st.just("final"), SAID)
    | st.tuples(st.just("commentary"), SAID)
    | st.tuples(
        st.sampled_from(KNOWN), st.dictionaries(SAID, st.integers() | SAID | st.lists(SAID, max_size=2), max_size=3)
    ),
    max_size=6,
)


def rendered(kind, said, order):
    if kind not in KNOWN:
        return f"<|channel|>{kind}<|message|>{said}<|end|>"
    to, arguments = f" to=functions.{kind}", json.dumps(said, ensure_ascii=False)
    if order:
        return f"{to}<|channel|>commentary json<|message|>{arguments}<|call|>"
    return f"<|channel|>commentary{to} <|constrain|>json<|message|>{arguments}<|call|>"


@settings(max_examples=150, deadline=None)
@given(messages=MESSAGES, order=st.booleans(), places=st.lists(st.integers(0, 10_000), max_size=30))
def test_messages_are_read_however_they_are_cut(messages, order, places):
    text = "<|start|>assistant".join(rendered(kind, said, order) for kind, said in messages)
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    whole = read([text[a:b] for a, b in itertools.pairwise(edges)])
    assert [(name, json.loads(arguments)) for name, arguments in whole.calls] == [m for m in messages if m[0] in KNOWN]
    thought = "".join(said for kind, said in messages if kind == "analysis")
    content = "".join(said for kind, said in messages if kind in ("final", "commentary"))
    assert ("".join(whole.thought.split()), "".join(whole.content.split())) == (
        "".join(thought.split()),
        "".join(content.split()),
    )


def test_marks_of_special_tokens_open_a_thought_anywhere():
    marks = Marks("[THINK]", "[/THINK]", anywhere=True)
    assert read(["Well. [THINK]sum[/THINK] 4"], marks=marks, calls=None) == ("Well.4", [], "sum")
