"""Frames on the ring's sockets: what goes in comes out, and hostile bytes come to nothing."""

import asyncio
import socket
import tempfile
import threading

import msgspec
import pytest
import zmq
from hypothesis import given
from hypothesis import strategies as st

from quartet.runtime import sockets
from quartet.runtime.control import Abort, FlushCache, Probe
from quartet.runtime.limits import MAX_IPC_MESSAGE_BYTES
from quartet.runtime.messages import Finish, Generate, Request, Text, Tokenized, Tokens, pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.sockets import (
    IPC_PATH_MAX,
    UNREADABLE,
    AsyncInbox,
    FrameTooLarge,
    Inbox,
    Outbox,
    decode,
    encode,
    endpoint,
    frames,
    newest_epoch,
    point_stable_path,
)

REQUEST = Request(rid="r", params=SamplingParams(temperature=0), seed=3)
MESSAGES = [
    Generate(request=REQUEST, text="hi"),
    Tokenized(request=REQUEST, prompt_ids=pack_ids([1, 2])),
    Tokens(rid="r", ids=pack_ids([3]), finish=Finish(reason="stop", matched=3)),
    Text(text="x", tokens=Tokens(rid="r")),
    Abort(rid="r"),
    FlushCache(id="1", timeout=2.0),
    Probe(id="2", counters={"scheduler": {"running": 1}}),
]
NESTED_TOO_DEEP = b"\x91" * 100_000
HUGE_LENGTHS = [b"\xdd\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff"]


@pytest.fixture
def address():
    with tempfile.TemporaryDirectory(prefix="q", dir="/tmp") as directory:
        yield endpoint(directory, "scheduler", 0)


def test_a_frame_is_a_list_that_comes_back_equal_and_in_order():
    assert decode(encode(MESSAGES)) == MESSAGES


@given(st.binary(max_size=200))
def test_arbitrary_bytes_raise_value_error_or_recursion_error_only(frame):
    try:
        messages = decode(frame)
    except (ValueError, RecursionError):
        return
    assert isinstance(messages, list)


@given(st.data())
def test_a_damaged_frame_raises_value_error_or_recursion_error_only(data):
    frame = bytearray(encode(MESSAGES))
    for _ in range(data.draw(st.integers(1, 4))):
        frame[data.draw(st.integers(0, len(frame) - 1))] = data.draw(st.integers(0, 255))
    cut = data.draw(st.integers(0, len(frame)))
    try:
        decode(bytes(frame[:cut]))
    except (ValueError, RecursionError):
        return


@pytest.mark.parametrize("frame", [NESTED_TOO_DEEP, *HUGE_LENGTHS, b"\x91\xa4\xff\xff\xff\xff"])
def test_known_bombs_are_refused_at_once(frame):
    with pytest.raises((ValueError, RecursionError)):
        decode(frame)


def test_an_inbox_drops_and_counts_hostile_frames_and_serves_on(address):
    inbox = Inbox(address)
    push = zmq.Context.instance().socket(zmq.PUSH)
    push.setsockopt(zmq.LINGER, 0)
    push.connect(address)
    push.send(NESTED_TOO_DEEP)
    push.send(msgspec.msgpack.encode([{"type": "no such message"}]))
    push.send(encode(MESSAGES[:1]))
    received = []
    while not received:
        received = inbox.recv(timeout_s=120)
    assert received == MESSAGES[:1]
    assert inbox.rejected == 2
    push.close()
    inbox.close()


def test_a_connection_that_speaks_no_zmq_does_not_disturb_the_others(address):
    inbox, outbox = Inbox(address), Outbox(address)
    with socket.socket(socket.AF_UNIX) as stranger:
        stranger.connect(address.removeprefix("ipc://"))
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" * 100)
        outbox.send(MESSAGES)
        assert inbox.recv(timeout_s=120) == MESSAGES
    outbox.close()
    inbox.close()


def test_everything_that_waits_is_received_at_once_in_the_order_of_sending(address):
    inbox, outbox = Inbox(address), Outbox(address)
    for message in MESSAGES:
        outbox.send([message])
    received = inbox.recv(timeout_s=120)
    while len(received) < len(MESSAGES):
        received += inbox.recv(timeout_s=120)
    assert received == MESSAGES
    outbox.close()
    inbox.close()


def test_an_inbox_waits_as_long_as_it_is_told(address):
    inbox, outbox = Inbox(address), Outbox(address)
    try:
        assert inbox.recv(0.0) == [] == inbox.recv(0.01)
        later = threading.Timer(0.05, outbox.send, [MESSAGES])
        later.start()
        assert inbox.recv(None) == MESSAGES
        assert inbox.recv(0.01) == []
        later.join()
    finally:
        inbox.close()
        outbox.close()


def test_an_event_loop_gets_frames_one_by_one_and_bursts_in_order(address):
    async def received() -> list[Abort]:
        inbox, outbox, got = AsyncInbox(address), Outbox(address), []
        try:
            for number in range(3):  # each is waited for
                waiting = asyncio.ensure_future(inbox.recv())
                await asyncio.sleep(0.01)
                outbox.send([Abort(rid=str(number))])
                got += await asyncio.wait_for(waiting, 10)
            for number in range(3, 200):  # before anybody waits
                outbox.send([Abort(rid=str(number))])
                await asyncio.sleep(0)
            while len(got) < 200:
                got += await asyncio.wait_for(inbox.recv(), 10)
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(inbox.recv(), 0.01)
            outbox.send([Abort(rid="200")])
            return got + await asyncio.wait_for(inbox.recv(), 10)
        finally:
            inbox.close()
            outbox.close()

    assert [message.rid for message in asyncio.run(received())] == [str(number) for number in range(201)]


def test_an_empty_list_is_not_sent(address):
    inbox, outbox = Inbox(address), Outbox(address)
    outbox.send([])
    outbox.send(MESSAGES[:1])
    assert inbox.recv(timeout_s=120) == MESSAGES[:1]
    outbox.close()
    inbox.close()


def test_a_frame_above_the_limit_is_not_sent():
    too_many = pack_ids([0]) * (MAX_IPC_MESSAGE_BYTES // 4)
    with pytest.raises(FrameTooLarge):
        encode([Tokenized(request=REQUEST, prompt_ids=too_many)])


def test_messages_that_exceed_a_frame_together_are_split_and_keep_their_order():
    messages = [Tokens(rid=str(n), ids=bytes(40)) for n in range(9)]
    sent = list(frames(messages, limit_bytes=200))
    assert len(sent) > 1
    assert all(len(frame) <= 200 for frame in sent)
    assert [message for frame in sent for message in decode(frame)] == messages


def test_a_message_that_exceeds_a_frame_alone_ends_its_request_and_no_other():
    messages = [Tokens(rid="a"), Tokens(rid="b", attempt=2, hidden_states=bytes(4000)), Tokens(rid="c")]
    sent = [message for frame in frames(messages, limit_bytes=500) for message in decode(frame)]
    assert [message.rid for message in sent] == ["a", "b", "c"]
    ended = sent[1]
    assert ended.attempt == 2
    assert ended.finish.reason == "error"
    assert "too large" in ended.finish.message


def test_a_command_that_exceeds_a_frame_is_refused_and_what_has_no_end_is_dropped():
    large = Probe(id="c", counters={"a": {"x": "x" * 600}})
    nobodys = Abort(rid="x" * 600)
    sent = [message for frame in frames([FlushCache(id="a"), large, nobodys], 500) for message in decode(frame)]
    assert [(message.id, getattr(message, "success", None)) for message in sent] == [("a", None), ("c", False)]


def test_a_message_that_cannot_be_written_ends_its_request_and_no_other():
    messages = [Tokens(rid="a"), Text(text="\ud800", tokens=Tokens(rid="b")), Tokens(rid="c")]
    a, b, c = [message for frame in frames(messages) for message in decode(frame)]
    assert (a.rid, c.rid) == ("a", "c")
    assert (b.tokens.rid, b.tokens.finish.status) == ("b", 500)


@pytest.mark.parametrize(
    ("wrong", "stands_for"),
    [
        ({"type": "tokens", "rid": "b", "attempt": 2, "ids": 7}, [Tokens(rid="b", attempt=2, ids=UNREADABLE)]),
        ({"type": "tokens", "rid": "b", "attempt": "x"}, [Tokens(rid="b", ids=UNREADABLE)]),
        ({"type": "text", "tokens": {"rid": "b"}, "text": 5}, [Tokens(rid="b", ids=UNREADABLE)]),
        ({"type": "generate", "request": {"rid": "b"}}, [Tokens(rid="b", ids=UNREADABLE)]),
        ({"type": "no such", "rid": 5, "id": 6}, []),
        ({"type": "facts", "epoch": "x"}, []),
        (["tokens"], []),
        (5, []),
    ],
)
def test_a_message_that_cannot_be_decoded_ends_its_request_and_loses_no_other(wrong, stands_for):
    before, after = Tokens(rid="a"), Tokens(rid="c")
    frame = msgspec.msgpack.encode([before, wrong, after])
    gate = sockets._Gate()
    assert gate.open(frame) == [before, *stands_for, after]
    assert gate.rejected == 1


def test_a_command_that_cannot_be_decoded_is_answered():
    [reply] = sockets._Gate().open(msgspec.msgpack.encode([{"type": "flush_cache", "id": "c", "timeout": "x"}]))
    assert (reply.id, reply.success, reply.status) == ("c", False, 500)


def test_the_newest_epoch_is_the_one_that_the_launcher_has_turned_the_door_to(tmp_path):
    assert newest_epoch(str(tmp_path), "scheduler") == 0
    point_stable_path(str(tmp_path), "scheduler", 12)
    assert newest_epoch(str(tmp_path), "scheduler") == 12


def test_an_endpoint_names_role_and_epoch():
    assert endpoint("/run/q", "scheduler", 7) == "ipc:///run/q/scheduler.7"


def test_an_endpoint_that_fits_exactly_is_accepted_and_one_byte_more_is_refused():
    room = IPC_PATH_MAX - len("/scheduler.0")
    endpoint("/" + "d" * (room - 1), "scheduler", 0)
    with pytest.raises(ValueError, match="XDG_RUNTIME_DIR"):
        endpoint("/" + "d" * room, "scheduler", 0)


def test_the_limit_of_a_socket_path_counts_bytes_not_characters():
    with pytest.raises(ValueError, match="longer than"):
        endpoint("/" + "é" * (IPC_PATH_MAX // 2), "scheduler", 0)


def test_malformed_frames_are_logged_once_a_minute(caplog):
    gate = sockets._Gate()
    for _ in range(3):
        assert gate.open(b"\xff") == []
    assert gate.rejected == 3
    assert len([record for record in caplog.records if "malformed" in record.message]) == 1
