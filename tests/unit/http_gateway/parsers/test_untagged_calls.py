"""An answer that is nothing but calls without their tags is calls; every other one is passed on as it is."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quartet.http_gateway.parsers.tool_events import Arguments, CallStart, Content, Event, Thought, collect
from quartet.http_gateway.parsers.untagged_calls import UntaggedCalls

WEATHER = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "days": {"type": "integer"},
        "unit": {"enum": ["C", "F"]},
        "near": {"type": ["array", "null"]},
    },
    "required": ["city"],
}
SCHEMAS = {"weather": WEATHER, "now": {}, "any": {"type": "object", "properties": {"x": {}}}}
CALL = '{"name": "weather", "arguments": {"city": "Oslo"}}'
NOW = '{"name": "now", "arguments": {}}'
OSLO = ("weather", '{"city": "Oslo"}')


def read(*pieces: str) -> list[Event]:
    reading = UntaggedCalls(SCHEMAS.keys(), SCHEMAS)
    events = [event for piece in pieces for event in reading.read([Content(piece)], last=False)]
    return events + reading.read([], last=True)


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        (CALL, [OSLO]),
        (f"\n {CALL}\n", [OSLO]),
        (f"```json\n{CALL}\n```", [OSLO]),
        (f"```\n{CALL}\n```\n", [OSLO]),
        (f"{CALL}\n{NOW}", [OSLO, ("now", "{}")]),
        (f"[{CALL}, {NOW}]", [OSLO, ("now", "{}")]),
        (f"```json\n[{CALL}]\n```", [OSLO]),
        ('{"arguments": {"city": "Oslo"}, "name": "weather"}', [OSLO]),
        ('{"name": "weather", "parameters": {"city": "Oslo"}}', [OSLO]),
        (
            '{"name": "weather", "arguments": {"city": "Å\\n", "days": 2, "unit": "C", "near": null}}',
            [("weather", '{"city": "Å\\n", "days": 2, "unit": "C", "near": null}')],
        ),
        ('{"name": "any", "arguments": {"x": [1]}}', [("any", '{"x": [1]}')]),
    ],
)
def test_an_answer_that_is_nothing_else_is_calls(text: str, calls: list[tuple[str, str]]) -> None:
    assert collect(read(text))[:2] == ("", calls)
    assert collect(read(*text))[:2] == ("", calls), "character by character"


@pytest.mark.parametrize(
    "text",
    [
        "The weather is fine.",
        f"I call it: {CALL}",
        f"{CALL} That is the call.",
        f"```json\n{CALL}\n```\nRun this.",
        f"{CALL}\nand so on",
        '{"name": "stranger", "arguments": {"city": "Oslo"}}',
        '{"name": "Ada", "age": 36}',
        '{"people": []}',
        '{"name": "weather", "arguments": {}}',
        '{"name": "weather", "arguments": {"city": 3}}',
        '{"name": "weather", "arguments": {"city": "Oslo", "temperature": 17}}',
        '{"name": "weather", "arguments": {"city": "Oslo", "unit": "K"}}',
        '{"name": "weather", "arguments": {"city": "Oslo", "days": 1.5}}',
        '{"name": "weather", "arguments": {"city": "Oslo", "days": true}}',
        '{"name": "weather", "arguments": {"city": "Oslo"}, "temperature": 17}',
        '{"name": "weather", "arguments": "{}"}',
        '{"name": "weather", "arguments": {"city": "Oslo"}',
        '{"name": "now", "arguments": {"x": 1}}',
        f"[{CALL}, 3]",
        f'[{CALL}, {{"name": "stranger", "arguments": {{}}}}]',
        f"[{CALL}",
        f"```python\n{CALL}\n```",
        "```json\n[1, 2]\n```",
        "[" * 100_000,
        '{"name": "any", "arguments": {"x": ' + "[" * 50_000,
        '{"name": "any", "arguments": {"x": NaN}}',
        '{"name": "any", "arguments": {"x": -Infinity}}',
        '{"name": "any", "arguments": {"x": 1e400}}',
        '{"name": "any", "arguments": {"x": "half of a character: \\ud83d"}}',
        '{"name": "any", "arguments": {"\\udc00": 1}}',
        "",
        "{",
        "``",
    ],
)
def test_any_other_answer_is_text_to_the_last_character(text: str) -> None:
    for events in (read(text), read(*(text[start : start + 7] for start in range(0, len(text), 7)))):
        assert collect(events) == (text, [], "")


@pytest.mark.parametrize(
    ("begin", "more"),
    [
        ("The", " weather"),
        ('{"people"', ": []}"),
        ('{"name": "Ada"', ', "age": 36}'),
        ("```py", "thon"),
        (CALL + " so", " it is"),
    ],
)
def test_text_is_held_back_no_longer_than_it_may_be_calls(begin: str, more: str) -> None:
    reading = UntaggedCalls(SCHEMAS.keys(), SCHEMAS)
    assert reading.read([Content(begin)], last=False) == [Content(begin)]
    assert reading.read([Content(more)], last=False) == [Content(more)]


def test_a_thought_may_come_before_and_a_tagged_call_leaves_nothing_to_find() -> None:
    reading = UntaggedCalls(SCHEMAS.keys(), SCHEMAS)
    assert reading.read([Thought("Let me see.")], last=False) == [Thought("Let me see.")]
    assert reading.read([Content(CALL)], last=True) == [CallStart(0, "weather"), Arguments(0, OSLO[1])]
    reading = UntaggedCalls(SCHEMAS.keys(), SCHEMAS)
    tagged = [CallStart(0, "now"), Arguments(0, "{}"), Content(CALL)]
    assert reading.read(tagged, last=True) == tagged


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.dictionaries(st.just("x"), st.recursive(st.none() | st.integers() | st.text(), st.lists)), max_size=3),
    st.data(),
)
def test_whatever_arguments_hold_they_come_through(arguments: list[dict[str, object]], data: st.DataObject) -> None:
    text = "\n".join(
        json.dumps({"name": "any", "arguments": one}, ensure_ascii=data.draw(st.booleans())) for one in arguments
    )
    cut = data.draw(st.integers(0, len(text)))
    found = collect(read(text[:cut], text[cut:]))
    assert [json.loads(call.arguments) for call in found.calls] == arguments and not found.content
