"""The reader of outputs: linear in its input however that is cut, and right where formats meet."""

import gc
import time
from dataclasses import replace

import pytest

from quartet.http_gateway.parsers.call_formats import FORMATS, REQUIRED
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.thoughts import BRACKETS, QWEN3, Marks
from quartet.http_gateway.parsers.tool_events import collect

KNOWN = ["f", "get_weather"]
CALL = '{"name": "f", "parameters": {"a": 1}}'
SIZES = {1: (1 << 10, 1 << 12), 1 << 20: (1 << 13, 1 << 15)}  # by the length of the pieces
MOST_TIMES = 8.0  # for four times the text: linear is 4, quadratic 16
LEAST_S = 0.02  # below, the clock says little
TRIES = 4  # other work on the same core makes a measurement worse, never better


def openings(name):
    form = REQUIRED if name == "required" else FORMATS[name]
    if form.channels:
        return "<|channel|>commentary to=functions.f<|message|>"
    return form.opening or form.bare[0] + form.brackets


def hostile(name, size):
    """Texts of about `size` characters that made, or could make, a parser read them again and again."""
    tag = openings(name)
    lead = tag.removesuffix("{")
    pythonic = name == "pythonic"
    call = "[f(a=1)" if pythonic else lead + CALL
    inside = "[f(a=" if pythonic else lead + '{"name": "f", "parameters": {"a": '
    before = "[f(a=" if pythonic else lead + '{"parameters": {"a": '
    return {
        "blanks behind a call": call + " " * size + "x",
        "blanks before a call": lead + " " * size + "x",
        "blanks": " " * size + "x",
        "blank lines in text": "x" + "\n" * size + "x",
        "blanks in arguments": inside + " " * size,
        "blanks in a head": lead + '{ "name"' + " " * size + ":",
        "open brackets": inside + "[" * size,
        "open brackets before the name": before + "{" * size,
        "half tags": tag[:-1] * (size // max(len(tag) - 1, 1)),
        "tags": tag * (size // len(tag)),
        "heads": (lead + '{"name": ') * (size // (len(lead) + 9)),
        "objects that are no calls": (lead + '{"type": 1}') * (size // (len(lead) + 11)),
        "a long name": lead + '{"name": "' + "f" * size,
        "a long key": lead + '{"' + "f" * size,
        "quotes": inside + '"' * size,
        "backslashes": inside + '"' + "\\" * size,
        "half escapes": inside + '"' + "\\u00" * (size // 4),
        "separators": call + ",;" * (size // 2),
        "a bare name": lead + "f" * size,
        "closed thoughts": "</think>" * (size // 8),
        "thoughts": "<think>" * (size // 7),
        "messages": "<|start|>assistant<|channel|>final<|message|>" * (size // 44),
        "calls": (call + " ") * (size // (len(call) + 1)),
    }


def cost(name, kind, size, step):
    """CPU seconds, the lesser of two."""
    text = hostile(name, size)[kind]
    best = float("inf")
    for _ in range(2):
        form = REQUIRED if name == "required" else FORMATS[name]
        reader = OutputReader(Marks(), "past" if form.bare else "inside", form, KNOWN)
        gc.disable()  # a collection looks at everything that the whole suite has made
        try:
            started = time.process_time()
            events = [event for at in range(0, len(text), step) for event in reader.feed(text[at : at + step])]
            collect(events + reader.finish())
            best = min(best, time.process_time() - started)
        finally:
            gc.enable()
    return best


@pytest.mark.parametrize("step", SIZES, ids=["by characters", "whole"])
@pytest.mark.parametrize("kind", sorted(hostile("hermes", 100)))
@pytest.mark.parametrize("name", ["gpt-oss", "hermes", "llama3", "mistral", "pythonic", "qwen3_coder", "required"])
def test_four_times_the_text_takes_four_times_the_work(name, kind, step):
    least = [float("inf")] * 2
    for _ in range(TRIES):
        least = [min(known, cost(name, kind, size, step)) for known, size in zip(least, SIZES[step], strict=True)]
        if least[1] <= max(MOST_TIMES * least[0], LEAST_S):
            return
    raise AssertionError(least)


def test_a_dropped_call_in_an_unclosed_thought_keeps_its_text_in_the_thought():
    reader = OutputReader(Marks(), "inside", FORMATS["hermes"], KNOWN)
    text = 'I might <tool_call>{"name": "stranger", "arguments": {}}</tool_call> so</think>\nNo.'
    whole = collect([*reader.feed(text), *reader.finish()])
    assert (whole.thought, whole.content, whole.calls) == (text.partition("</think>")[0], "No.", [])


def test_a_closing_tag_inside_what_looked_like_a_call_still_closes_the_thought():
    text = 'say <tool_call>{"name": "</think>\n<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    for step in (1, 7, len(text)):
        reader = OutputReader(Marks(), "inside", FORMATS["hermes"], KNOWN)
        events = [event for at in range(0, len(text), step) for event in reader.feed(text[at : at + step])]
        whole = collect(events + reader.finish())
        assert whole.thought == 'say <tool_call>{"name": "' and whole.content == ""
        assert whole.calls == [("f", '{"a": 1}')]


def read(reader, text, step):
    return collect(
        [event for at in range(0, len(text), step) for event in reader.feed(text[at : at + step])] + reader.finish()
    )


@pytest.mark.parametrize("place", ["before", "inside"])
def test_a_call_in_a_thought_is_a_part_of_the_thought_whether_that_is_closed_or_not(place):
    call = '<tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    opening = "<think>" * (place == "before")
    for step in (1, 7, 1000):
        closed = read(OutputReader(Marks(), place, FORMATS["hermes"], KNOWN), f"{opening}I {call} so</think>No.", step)
        assert closed == ("No.", [], f"I {call} so")
        cut = read(OutputReader(Marks(), place, FORMATS["hermes"], KNOWN), f"{opening}I {call} so", step)
        assert cut == ("", [], f"I {call} so")


@pytest.mark.parametrize("calls", [REQUIRED, FORMATS["pythonic"], FORMATS["json"]])
def test_a_thought_is_found_however_its_tag_is_cut_though_calls_begin_with_its_first_character(calls):
    for step in (1, 3, 1000):
        whole = read(OutputReader(BRACKETS, "before", calls, KNOWN), "[THINK]I may.[/THINK]No.", step)
        assert whole == ("No.", [], "I may."), step


def test_thoughts_and_calls_take_turns():
    call = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    text = f"<think>one</think>\nText.\n{call}\n<think>two</think><think>three</think> More. {call}<think>four"
    for step in (1, 7, 1000):
        whole = read(OutputReader(Marks(), "before", FORMATS["hermes"], KNOWN), text, step)
        assert whole == ("Text.More.", [("f", "{}"), ("f", "{}")], "onetwothreefour")


def test_a_call_ends_the_thought_of_a_family_that_forgets_the_closing_tag():
    call = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
    stranger = '<tool_call>{"name": "stranger", "arguments": {}}</tool_call>'
    for text, expected in (
        (f"I call it.\n{call}", ("I call it.", "", [("f", '{"a": 1}')])),
        (f"I call it.\n{call}\nDone.", ("I call it.", "\nDone.", [("f", '{"a": 1}')])),
        (f"Not {stranger} now</think>\nNo.", (f"Not {stranger} now", "No.", [])),
        (f"One</think>{call}", ("One", "", [("f", '{"a": 1}')])),
        ('Not <tool_call>{"</think>No.', ('Not <tool_call>{"', "No.", [])),
        (f'Not <tool_call>{{"</think>{call}', ('Not <tool_call>{"', "", [("f", '{"a": 1}')])),
        ('Not <tool_call>{"', ('Not <tool_call>{"', "", [])),
    ):
        for step in (1, 7, len(text)):
            reader = OutputReader(QWEN3, "inside", FORMATS["hermes"], KNOWN)
            events = [event for at in range(0, len(text), step) for event in reader.feed(text[at : at + step])]
            whole = collect(events + reader.finish())
            assert (whole.thought, whole.content, [tuple(c) for c in whole.calls]) == expected, (text, step)


DEMANDED = {  # calls of f as the grammars of demanded calls write them
    "hermes": '<tool_call>\n{"name": "f", "arguments": {}}\n</tool_call>',
    "mistral": '[TOOL_CALLS] [{"name": "f", "arguments": {}}, {"name": "f", "arguments": {}}]',
    "qwen3_coder": "<tool_call>\n<function=f>\n<parameter=a>\nx\n</parameter>\n</function>\n</tool_call>",
    "glm45": "<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>x</arg_value>\n</tool_call>",
    "granite": '<|tool_call|>[{"name": "f", "arguments": {}}]',
    "kimi_k2": (
        "<|tool_calls_section_begin|><|tool_call_begin|>functions.f:0<|tool_call_argument_begin|>"
        "{}<|tool_call_end|><|tool_calls_section_end|>"
    ),
    "deepseekv3": (
        "<｜tool▁calls▁begin｜><｜tool▁call▁begin｜>function<｜tool▁sep｜>f\n```json\n"
        "{}\n```<｜tool▁call▁end｜><｜tool▁calls▁end｜>"
    ),
    "gemma3": "```tool_code\nf()\n```",
    "olmo3": "<function_calls>f()</function_calls>",
}


@pytest.mark.parametrize("name", DEMANDED)
def test_a_demanded_call_that_is_cut_anywhere_is_never_content(name: str) -> None:
    form = replace(FORMATS[name], alone=True)
    text = DEMANDED[name] if name == "mistral" else f"{DEMANDED[name]}\n{DEMANDED[name]}"
    for end in range(1, len(text) + 1):
        for step in (end, 1):
            reader = OutputReader(calls=form, known=["f"])
            events = [event for at in range(0, end, step) for event in reader.feed(text[at : min(at + step, end)])]
            assert collect([*events, *reader.finish()]).content == "", text[:end]


def test_what_may_begin_a_call_is_content_where_none_is_demanded_and_thought_in_a_thought() -> None:
    reader = OutputReader(calls=FORMATS["hermes"], known=["f"])
    assert collect([*reader.feed("Say <tool_c"), *reader.finish()]).content == "Say <tool_c"
    demanded = replace(FORMATS["hermes"], alone=True)
    reader = OutputReader(Marks("<think>", "</think>"), "inside", demanded, ["f"])
    assert collect([*reader.feed("Say <tool_c"), *reader.finish()]).thought == "Say <tool_c"
