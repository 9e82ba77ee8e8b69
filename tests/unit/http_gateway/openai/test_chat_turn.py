"""A model's turn: however its text is cut and however its deltas are joined, the message is the same."""

import itertools
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from quartet.http_gateway.openai.answers import ChatMessage, Delta
from quartet.http_gateway.openai.chat_turn import Turn, merged, message_of
from quartet.http_gateway.parsers.call_formats import FORMATS
from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.thoughts import Marks

PIECES = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    '{"name": "f", "arguments": {"a": [1, "}"]}}',
    '{"name": "unknown", "arguments": {}}',
    "text",
    " ",
    "\n\n",
    "<",
    "é🙂",
)


def new_turn(streamed: bool = True) -> Turn:
    reader = OutputReader(Marks(), calls=FORMATS["hermes"], known=["f", "g"])
    return Turn(reader, stream_reasoning=streamed)


def plain(message: ChatMessage) -> Any:
    """A message without the ids of its calls, which are drawn."""
    calls = [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]
    return message.content, message.reasoning_content, calls


def read(turn: Turn, parts: list[str]) -> list[Delta]:
    deltas = [delta for part in parts for delta in turn.read(part, last=False)]
    return deltas + turn.read("", last=True)


@given(st.lists(st.sampled_from(PIECES), max_size=10), st.lists(st.integers(0, 100), max_size=8), st.booleans())
def test_a_message_does_not_depend_on_where_its_text_was_cut(
    pieces: list[str], cuts: list[int], streamed: bool
) -> None:
    text = "".join(pieces)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    parts = [text[start:end] for start, end in itertools.pairwise(places)]
    whole = message_of(new_turn().read(text, last=True))
    assert plain(message_of(read(new_turn(streamed), parts))) == plain(whole)
    assert plain(message_of(merged(read(new_turn(streamed), parts)))) == plain(whole)


def test_neighbours_of_one_kind_are_joined_and_others_are_not() -> None:
    deltas = [
        Delta(reasoning_content="a"),
        Delta(reasoning_content="b"),
        Delta(content="c"),
        Delta(content="d"),
        Delta(reasoning_content="e"),
    ]
    assert [(d.reasoning_content, d.content) for d in merged(deltas)] == [("ab", None), (None, "cd"), ("e", None)]


def test_a_turn_without_parsers_is_its_text() -> None:
    turn = Turn()
    text = "<think>a</think><tool_call>"
    assert plain(message_of([*turn.read(text, last=False), *turn.read("", last=True)])) == (text, None, [])
    assert not turn.called and not turn.thinking


def test_an_empty_turn_has_empty_content() -> None:
    assert message_of(Turn().read("", last=True)).content == ""
