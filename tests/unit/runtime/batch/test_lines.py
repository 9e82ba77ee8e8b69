"""Lines of a batch: what can be sent, and what is said of the others."""

import io
import json

import msgspec
import pytest

from quartet.runtime.batch import lines
from quartet.runtime.batch.lines import BadLine, Request
from quartet.runtime.limits import MAX_BATCH_LINE_BYTES

CHAT = "/v1/chat/completions"


def line(custom_id="a", **fields) -> bytes:
    return json.dumps({"custom_id": custom_id, "method": "POST", "url": CHAT, "body": {"x": 1}, **fields}).encode()


def read(*texts: bytes) -> list[Request | BadLine]:
    return list(lines.read(io.BytesIO(b"\n".join(texts))))


def test_a_line_is_sent_as_it_stands():
    assert read(line(body={"model": "m", "n": 1.0})) == [Request(1, "a", CHAT, b'{"model":"m","n":1.0}')]


def test_empty_lines_are_left_out_and_numbers_are_those_of_the_file():
    assert [request.number for request in read(b"", line("a"), b"  ", line("b"))] == [2, 4]


@pytest.mark.parametrize(
    ("text", "code", "says"),
    [
        (b"{broken", "invalid_json_line", "line 1: "),
        (b"\xff", "invalid_json_line", "line 1: "),
        (line(custom_id=""), "invalid_custom_id", "custom_id must have"),
        (line(custom_id=7), "invalid_json_line", "custom_id"),
        (line(body=[1]), "invalid_json_line", "body"),
        (line(method="GET"), "invalid_json_line", "method"),
        (line(url="/generate"), "invalid_url", "'/generate'"),
        (line(body={"stream": True}), "invalid_request", "stream"),
        (b"[" * 100_000, "invalid_json_line", "line 1: "),
    ],
)
def test_what_is_wrong_with_a_line_names_it_and_the_field(text, code, says):
    [wrong] = read(text)
    assert isinstance(wrong, BadLine)
    assert (wrong.failure.code, wrong.failure.line) == (code, 1)
    assert says in wrong.failure.message


def test_a_wrong_line_keeps_its_name_where_it_has_one():
    assert [wrong.custom_id for wrong in read(line("b", url="/x"), b'{"custom_id": "c"}', b'{"custom_id": 1}')] == [
        "b",
        "c",
        None,
    ]


def test_a_name_that_was_there_before_is_an_error_of_the_later_line():
    first, second, third = read(line("a"), line("a"), line("b"))
    assert isinstance(first, Request) and isinstance(third, Request)
    assert second.failure.message == "line 2: custom_id 'a' stands on an earlier line too"


def test_a_line_that_is_too_long_is_passed_over_whole():
    long, after = read(line(body={"x": "y" * MAX_BATCH_LINE_BYTES}), line("b"))
    assert long.failure.code == "line_too_long"
    assert (after.number, after.custom_id) == (2, "b")


def test_an_answer_takes_one_line_whatever_the_server_sends():
    pretty = lines.answered("a", 200, b'{\n "x": 1.0\n}')
    assert bytes(pretty.response.body) == b'{"x":1.0}'
    assert msgspec.json.decode(lines.answered("a", 502, b"Bad\nGateway").response.body) == "Bad\nGateway"
    assert b"\n" not in msgspec.json.encode(lines.answered("a", 502, b"Bad\nGateway"))
