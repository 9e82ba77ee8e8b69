"""One streamed answer, from a server whose events are known."""

import itertools

import httpx
import pytest

from quartet.runtime.client.answers import Answer, Piece
from quartet.runtime.client.connection import ClientError


class Stream(httpx.SyncByteStream):
    """Events, and whether the client closed it."""

    def __init__(self, *events: bytes, lost: bool = False) -> None:
        self.closed = False
        self._events = events
        self._lost = lost

    def __iter__(self):
        for event in self._events:
            yield b"data: " + event + b"\n\n"
        if self._lost:
            raise httpx.ReadError("gone")

    def close(self) -> None:
        self.closed = True


def answer(stream: Stream | None = None, status: int = 200, **more) -> Answer:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, stream=stream, **more))
    client = httpx.Client(transport=transport, base_url="http://server")
    return Answer(client, {"messages": []}, clock=itertools.count(0.0, 0.5).__next__)


THOUGHT = b'{"choices":[{"delta":{"reasoning_content":"Hm."}}]}'
TEXT = [b'{"choices":[{"delta":{"content":"Yes"}}]}', b'{"choices":[{"delta":{"content":"!"}}]}']
END = b'{"choices":[{"delta":{},"finish_reason":"stop"}]}'
USAGE = b'{"choices":[],"usage":{"prompt_tokens":3,"completion_tokens":4}}'


def test_thoughts_and_text_are_told_apart_and_counted_as_the_server_says():
    one = answer(Stream(b'{"choices":[{"delta":{"role":"assistant"}}]}', THOUGHT, *TEXT, END, USAGE, b"[DONE]"))
    assert list(one.pieces()) == [Piece(thought="Hm."), Piece(text="Yes"), Piece(text="!")]
    assert (one.text, one.finish_reason) == ("Yes!", "stop")
    assert one.figures() == "4 tokens, 3.0 tokens/s, first after 0.50 s"


def test_an_answer_that_was_cut_says_so():
    one = answer(Stream(TEXT[0], b'{"choices":[{"delta":{},"finish_reason":"length"}]}', USAGE, b"[DONE]"))
    list(one.pieces())
    assert one.figures() == "4 tokens, first after 0.50 s, cut at the longest length"


def test_without_usage_there_are_no_figures():
    one = answer(Stream(*TEXT, END, b"[DONE]"))
    list(one.pieces())
    assert one.figures() == ""


def test_closing_it_closes_the_stream_which_has_the_server_drop_the_request():
    stream = Stream(*TEXT, END)
    pieces = answer(stream).pieces()
    next(pieces)
    pieces.close()
    assert stream.closed


@pytest.mark.parametrize(
    ("stream", "message"),
    [
        (Stream(TEXT[0]), "the stream ended before the answer did"),
        (Stream(TEXT[0], lost=True), "the connection to http://server was lost"),
        (Stream(b'{"error":{"message":"out of memory"}}'), "out of memory"),
        (Stream(b"{"), "no chunk of an answer"),
    ],
)
def test_an_answer_that_does_not_end_is_an_error_in_one_line(stream, message):
    with pytest.raises(ClientError, match=message):
        list(answer(stream).pieces())


def test_a_refusal_is_told_with_its_reason():
    refused = answer(status=400, json={"error": {"message": "temperature must not be negative"}})
    with pytest.raises(ClientError, match="temperature must not be negative"):
        list(refused.pieces())


def test_what_servers_write_as_null_is_nothing_and_an_error_may_be_its_text():
    one = answer(Stream(b'{"choices":null}', b'{"choices":[{"delta":null}]}', TEXT[0], b'{"error":"out of memory"}'))
    with pytest.raises(ClientError, match=r"^out of memory$"):
        list(one.pieces())
    assert one.text == "Yes"
