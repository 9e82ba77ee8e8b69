"""The messages themselves: ids as bytes, small frames, and control commands from HTTP bodies."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartet.runtime import control
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, RingMessage, Tokens, pack_ids, unpack_ids


@given(st.lists(st.integers(-(2**31), 2**31 - 1)))
def test_token_ids_survive_packing(ids):
    assert list(unpack_ids(pack_ids(ids))) == ids


def test_token_ids_are_little_endian_int32():
    assert pack_ids([1, 258]) == b"\x01\x00\x00\x00\x02\x01\x00\x00"


def test_bytes_that_are_no_ids_are_refused():
    with pytest.raises(ValueError, match="length"):
        unpack_ids(b"\x00\x00\x00")


def test_fields_at_their_defaults_take_no_room():
    assert len(msgspec.msgpack.encode(Tokens(rid="r", ids=pack_ids([1])))) < 40


def test_every_message_and_command_has_a_tag_of_its_own():
    members = [*RingMessage.__args__, *control.COMMANDS]
    tags = [member.__struct_config__.tag for member in members]
    assert None not in tags
    assert len(set(tags)) == len(tags)


def test_a_refused_request_keeps_status_and_type():
    finish = Finish.failed(RequestError("too hot", Kind.TOO_MANY))
    assert (finish.reason, finish.message, finish.status, finish.type_name) == (
        "error",
        "too hot",
        429,
        "TooManyRequestsError",
    )


@pytest.mark.parametrize("body", [b"", b"  ", b"null", b"{}"])
def test_an_empty_body_means_all_defaults(body):
    assert control.from_body(control.FlushCache, body) == control.FlushCache()


def test_a_body_of_the_wrong_type_names_the_field():
    with pytest.raises(msgspec.ValidationError, match=r"\$\.timeout"):
        control.from_body(control.FlushCache, b'{"timeout": "soon"}')


def test_no_two_commands_share_a_path():
    paths = [path for command in control.COMMANDS if command.path for path in (command.path, *command.aliases)]
    assert sorted(control.routes()) == sorted(paths)
