"""Events of streams, in every form that servers write, cut anywhere."""

import pytest

from quartet.runtime.client.connection import ClientError
from quartet.runtime.client.events import EventReader

A, B = b'{"a": 1}', b'{"b": [2, "x"]}'
DIALECTS = {
    "the usual one": b"data: %s\n\ndata: %s\n\ndata: [DONE]\n\n",
    "no blank behind the colon": b"data:%s\n\ndata:%s\n\ndata:[DONE]\n\n",
    "carriage returns and line feeds": b"data: %s\r\n\r\ndata: %s\r\n\r\ndata: [DONE]\r\n\r\n",
    "carriage returns alone": b"data: %s\r\rdata: %s\r\rdata: [DONE]\r\r",
    "no empty lines": b"data: %s\ndata: %s\ndata: [DONE]\n",
    "comments and other fields": b": hi\n\nevent: x\nid: 7\ndata: %s\n: ping\n\n:\ndata: %s\n\ndata: [DONE]\n",
    "a byte order mark": b"\xef\xbb\xbfdata: %s\n\ndata: %s\n\ndata: [DONE]\n\n",
    "empty data": b"data\n\ndata:\n\ndata: %s\n\ndata: %s\n\ndata: [DONE]\n\n",
    "something behind the end": b"data: %s\n\ndata: %s\n\ndata: [DONE]\n\ndata: {}\n\n",
}


def read(body: bytes, size: int) -> tuple[list[bytes], bool]:
    reader = EventReader()
    events = [data for i in range(0, len(body), size) for data in reader.feed(body[i : i + size])]
    return events, reader.ended


@pytest.mark.parametrize("size", [1, 2, 3, 7, 1000])
@pytest.mark.parametrize("dialect", DIALECTS.values(), ids=DIALECTS)
def test_every_dialect_is_read_however_it_is_cut(dialect, size):
    assert read(dialect % (A, B), size) == ([A, B], True)


@pytest.mark.parametrize("size", [1, 5, 1000])
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b"\r"])
def test_data_over_several_lines_is_one_event(end, size):
    lines = [b"data: {", b'data:   "a": 1', b"data: }", b"", b"data: " + B, b"", b""]
    assert read(end.join(lines), size) == ([b'{\n"a": 1\n}', B], False)


def test_an_event_that_is_whole_is_there_before_the_line_behind_it():
    reader = EventReader()
    assert list(reader.feed(b"data: " + A + b"\n")) == [A]
    assert list(reader.feed(b"\n")) == []


def test_what_is_no_json_is_an_event_too():
    assert read(b"data: oops\n\n", 1000) == ([b"oops"], False)


@pytest.mark.parametrize("size", [1, 2, 7, 1000])
def test_events_are_read_whole_however_they_are_cut(size):
    body = b': comment\r\n\r\nevent: x\r\ndata: {"a": 1}\r\n\r\ndata:{"b": 2}\n\ndata: [DONE]\n\n'
    reader = EventReader()
    events = [data for i in range(0, len(body), size) for data in reader.feed(body[i : i + size])]
    assert events == [b'{"a": 1}', b'{"b": 2}']
    assert reader.ended


def test_an_event_without_an_end_is_given_up_by_its_size():
    reader = EventReader(most_bytes=1000)
    with pytest.raises(ClientError, match="more than 1000 bytes"):
        for _ in range(20):
            list(reader.feed(b"x" * 100))


def test_lines_of_one_event_are_given_up_by_their_size():
    reader = EventReader(most_bytes=1000)
    with pytest.raises(ClientError, match="more than 1000 bytes"):
        list(reader.feed(b"data: [1,\n" * 1000))
