"""Deltas of a chat completion become blocks and the events that tell of them."""

import json
from collections.abc import Sequence
from typing import Any

import pytest

from quartet.http_gateway.anthropic.content import ContentBlocks, arguments_of, call_id, closed
from quartet.http_gateway.openai.answers import CalledFunction, Delta, ToolCall
from quartet.http_gateway.openai.chat_turn import continued


def begun(index: int, name: str) -> Delta:
    return Delta(tool_calls=[ToolCall(id=f"call_{index}", index=index, function=CalledFunction("", name))])


def more(index: int, arguments: str) -> Delta:
    return Delta(tool_calls=[continued(index, arguments)])


ALL = [
    Delta(content=""),
    Delta(reasoning_content="pl"),
    Delta(reasoning_content="an"),
    Delta(content="I "),
    Delta(content="look."),
    begun(0, "f"),
    more(0, '{"a"'),
    more(0, ": 1}"),
    begun(1, "g"),
    Delta(content="Done."),
]


def events_of(content: ContentBlocks, deltas: Sequence[Delta]) -> list[dict[str, Any]]:
    events = [event for delta in deltas for event in content.take(delta)] + list(content.stop())
    found = [json.loads(event.data) for event in events]
    assert [event.type.decode() for event in events] == [data["type"] for data in found]
    return found


def test_each_block_is_stopped_before_the_next_one_starts() -> None:
    found = events_of(ContentBlocks("s"), ALL)
    steps = [(event["index"], event["type"].removeprefix("content_block_")) for event in found]
    assert steps == [
        *((0, step) for step in ("start", "delta", "delta", "delta", "stop")),
        *((1, step) for step in ("start", "delta", "delta", "stop")),
        *((2, step) for step in ("start", "delta", "delta", "stop")),
        *((3, step) for step in ("start", "stop")),
        *((4, step) for step in ("start", "delta", "stop")),
    ]
    assert [event["delta"]["type"] for event in found if "delta" in event] == [
        "thinking_delta",
        "thinking_delta",
        "signature_delta",
        "text_delta",
        "text_delta",
        "input_json_delta",
        "input_json_delta",
        "text_delta",
    ]


def test_blocks_start_empty_and_end_with_what_was_streamed() -> None:
    content = ContentBlocks("s")
    started = [event["content_block"] for event in events_of(content, ALL) if "content_block" in event]
    assert started[:3] == [
        {"type": "thinking", "thinking": "", "signature": ""},
        {"type": "text", "text": ""},
        {"type": "tool_use", "id": "toolu_0", "name": "f", "input": {}},
    ]
    thought, text, first, second, last = content.content()
    assert (thought.thinking, thought.signature) == ("plan", "s")  # type: ignore[union-attr]
    assert (text.text, last.text) == ("I look.", "Done.")  # type: ignore[union-attr]
    assert (first.input, second.input, second.id) == ({"a": 1}, {}, "toolu_1")  # type: ignore[union-attr]


def test_omitted_thinking_is_an_empty_block_with_a_signature() -> None:
    content = ContentBlocks("s", include_thinking=False)
    found = events_of(content, ALL[:5])
    assert [event["delta"]["type"] for event in found if "delta" in event] == [
        "signature_delta",
        "text_delta",
        "text_delta",
    ]
    assert content.content()[0].thinking == ""  # type: ignore[union-attr]


def test_a_message_may_have_no_content() -> None:
    content = ContentBlocks("s")
    assert events_of(content, [Delta(content="")]) == [] and content.content() == []


def test_call_ids_get_this_api_s_prefix_unless_the_model_has_its_own() -> None:
    assert [call_id("call_1"), call_id("aBcDeFgH1"), call_id("functions.f:0")] == [
        "toolu_1",
        "aBcDeFgH1",
        "functions.f:0",
    ]


WHOLE = '{"a": "x,}\\"", "b": [1, {"c": 2}, 3], "d": {}}'


@pytest.mark.parametrize("length", range(len(WHOLE) + 1))
def test_truncated_arguments_keep_their_complete_members(length: int) -> None:
    found, whole = arguments_of(WHOLE[:length]), json.loads(WHOLE)
    assert list(found) == list(whole)[: len(found)]
    assert all(found[name] == whole[name] for name in list(found)[:-1])
    if length == len(WHOLE):
        assert found == whole


@pytest.mark.parametrize("text", ['{"a": nope}', "[1, 2]", '{"a": nope, "b', "[" * 100_000])
def test_arguments_that_are_no_json_object_are_kept_as_text(text: str) -> None:
    assert arguments_of(text) == {"INVALID_JSON": text}


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("", "{}"),
        ("{", "{}"),
        ('{"a": 1', "{}"),
        ('{"a": 1,', '{"a": 1}'),
        ('{"a": 1, "b": [2, 3', '{"a": 1, "b": [2]}'),
        ('{"a": "b, {', "{}"),
    ],
)
def test_truncated_objects_are_closed(text: str, kept: str) -> None:
    assert closed(text) == kept
