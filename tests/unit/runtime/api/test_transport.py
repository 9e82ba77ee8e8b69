"""Answers of an engine as values and exceptions."""

import math
from types import MappingProxyType

import httpx
import pytest

from quartet.http_gateway.http.errors import FIELD_HEADER
from quartet.runtime.api import transport
from quartet.runtime.api.calls import Call
from quartet.runtime.api.transport import EngineError, Transport


def test_an_error_has_the_message_the_status_and_the_field():
    response = httpx.Response(400, headers={FIELD_HEADER: "top_k"}, json={"error": {"message": "top_k is wrong."}})
    with pytest.raises(EngineError, match=r"^top_k is wrong\.$") as error:
        transport.read(Call("/generate"), response)
    assert (error.value.status, error.value.field) == (400, "top_k")


def test_the_header_is_the_one_that_servers_send():
    assert FIELD_HEADER.lower() == transport.FIELD_HEADER


@pytest.mark.parametrize("code", [503, "rate_limit"])
def test_an_error_amid_a_stream_is_raised(code):
    with pytest.raises(EngineError, match="it died") as error:
        transport.event(b'{"error": {"message": "it died", "code": %s}}' % (b'"x"' if code == "rate_limit" else b"503"))
    assert error.value.status == (503 if code == 503 else 500)


def test_an_empty_answer_is_none_and_a_line_is_text():
    assert transport.read(Call("/x"), httpx.Response(200)) is None
    assert transport.read(Call("/x", is_text=True), httpx.Response(200, text="Cache flushed.")) == "Cache flushed."


def test_an_engine_that_has_ended_says_why(tmp_path):
    with pytest.raises(EngineError, match="it was killed") as error:
        Transport(tmp_path / "nobody", lambda: "it was killed").run(Call("/x"))
    assert error.value.status == 0


@pytest.mark.parametrize(("value", "error"), [(math.nan, ValueError), (b"abc", TypeError)])
def test_what_json_cannot_hold_is_not_sent(tmp_path, value, error):
    with pytest.raises(error):
        Transport(tmp_path / "nobody", lambda: "").run(Call("/x", {"prompt": value}))


def test_mappings_of_any_kind_are_sent_as_objects():
    made = transport.request(httpx.Client(base_url="http://a"), Call("/x", {"params": MappingProxyType({"n": 1})}))
    assert made.content == b'{"params": {"n": 1}}'
