"""Thought and answer are told apart however the output is cut."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.reasoning import FAMILIES, family, split
from quartet.http_gateway.parsers.tool_events import collect
from quartet.runtime.errors import RequestError


def parser(name):
    return OutputReader(family(name).marks, family(name).place)


def told(events):
    whole = collect(events)
    return whole.thought, whole.content


def stream(name, pieces):
    reading = parser(name)
    return told([event for piece in pieces for event in reading.feed(piece)] + reading.finish())


@pytest.mark.parametrize(
    ("name", "text", "reasoning", "content"),
    [
        ("qwen3", "<think>\nsum\n</think>\n\n4", "sum", "4"),
        ("qwen3", "4", "", "4"),
        ("qwen3", " plain </think> text ", "", " plain </think> text "),
        ("qwen3", "say <think>no</think>", "", "say <think>no</think>"),
        ("qwen3", "<think>\n\n</think>\n\n4", "", "4"),
        ("qwen3", "<think>never ended ", "never ended", ""),
        ("qwen3", "<thin", "", "<thin"),
        ("qwen3", "  ", "", "  "),
        ("deepseek-r1", "sum\n</think>\n4", "sum", "4"),
        ("deepseek-r1", "<think>\nsum</think>4", "sum", "4"),
        ("deepseek-r1", "cut off", "cut off", ""),
        ("deepseek-r1", "a </thin b", "a </thin b", ""),
        ("deepseek-r1", "a</think>b</think>c", "a", "b</think>c"),
        ("deepseek-r1", "<th", "<th", ""),
        ("qwen3-thinking", "x</think>y", "x", "y"),
        ("step3", "x</think>y", "x", "y"),
        ("glm45", "\n<think>x</think>\ny", "x", "y"),
        ("deepseek-v3", "<think>x</think>y", "x", "y"),
        ("kimi", "◁think▷ 日本 ◁/think▷ y ", "日本", "y "),
        ("kimi_k2", "<think>x</think>y", "x", "y"),
        ("minimax", "<think>x</think>y", "x", "y"),
        ("mistral", "[THINK]x[/THINK]y", "x", "y"),
        ("mistral", "Well. [THINK]x[/THINK] y", "x", "Well.y"),
        ("granite", "Here is my thought process:\nx\n\nHere is my response:\ny", "x", "y"),
        ("granite", "Here is my answer", "", "Here is my answer"),
        ("gpt-oss", "<|channel|>analysis<|message|>x<|end|><|start|>assistant<|channel|>final<|message|>y", "x", "y"),
        ("kimi", "<think>x</think>", "", "<think>x</think>"),
    ],
)
def test_thought_and_answer(name, text, reasoning, content):
    assert split(name, text) == (reasoning, content)
    assert stream(name, text) == (reasoning, content)


def test_a_thought_streams_as_it_is_written():
    reading = parser("qwen3")
    assert told(reading.feed("<think>\nI ")) == ("I", "")
    assert told(reading.feed("am</")) == (" am", "")
    assert told(reading.feed("think> so")) == ("", "so")
    assert told(reading.feed(" be it")) == ("", " be it")


PIECES = st.sampled_from(["<think>", "</think>", "◁think▷", "◁/think▷", "<", "</", "think>", "\n", " ", "日", "word"])


@settings(max_examples=300, deadline=None)
@given(
    name=st.sampled_from(sorted(FAMILIES)),
    pieces=st.lists(PIECES | st.text(max_size=3), max_size=12),
    places=st.lists(st.integers(0, 200), max_size=12),
)
def test_no_cut_changes_what_an_output_means(name, pieces, places):
    text = "".join(pieces)
    whole = split(name, text)
    assert stream(name, pieces) == whole
    edges = [0, *sorted(place % (len(text) + 1) for place in places), len(text)]
    assert stream(name, [text[a:b] for a, b in itertools.pairwise(edges)]) == whole
    marks = FAMILIES[name].marks

    def bare(part):
        return "".join(part.replace(marks.opening, "").replace(marks.closing, "").split())

    assert bare(whole.reasoning) + bare(whole.content) == bare(text)


def test_an_unknown_family_is_refused_with_the_list_of_known_ones():
    with pytest.raises(RequestError, match="deepseek-r1, deepseek-v3, glm45, kimi, qwen3, qwen3-thinking, step3"):
        family("nope")
