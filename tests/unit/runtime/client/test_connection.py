"""Addresses, errors in one line, and events that are cut anywhere."""

import json

import httpx
import pytest

from quartet.runtime.client.connection import (
    ClientError,
    base_url,
    check,
    client_options,
    connect,
    error_message,
    served_models,
    unreachable,
)
from quartet.runtime.errors import UsageError


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("localhost:30000", "http://localhost:30000"),
        ("http://localhost:30000/", "http://localhost:30000"),
        ("http://localhost:30000/v1/", "http://localhost:30000"),
        ("https://example.org/llm/v1", "https://example.org/llm"),
        ("[::1]:8000", "http://[::1]:8000"),
        ("example.org", "http://example.org"),
    ],
)
def test_an_address_is_understood_as_people_write_it(typed, meant):
    assert base_url(typed) == meant


@pytest.mark.parametrize("typed", ["", "ftp://example.org", "http://", "localhost:many", "http://a:99999999", "://"])
def test_what_is_no_address_is_refused_with_an_example(typed):
    with pytest.raises(UsageError, match="it looks like http://"):
        base_url(typed)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"error": {"message": "no"}}, "no"),
        ({"object": "error", "message": "no", "error": {"message": "no"}}, "no"),
        ({"error": "no"}, "no"),
        ({"success": False, "message": "no"}, "no"),
        ({"status": "unhealthy", "reason": "no"}, "no"),
        ({"detail": [{"loc": "x"}]}, '[{"loc": "x"}]'),
        ("<html>\n bad", '"<html>\\n bad"'),
    ],
)
def test_an_error_is_read_in_any_of_the_usual_shapes(body, message):
    assert error_message(json.dumps(body).encode()) == message


def test_an_error_that_is_a_page_is_its_beginning_in_one_line():
    shown = error_message(b"<html>\n" + b"x" * 9999 + b"\xff")
    assert shown.startswith("<html> x") and len(shown) == 300


def test_a_refused_key_says_how_to_give_one():
    with pytest.raises(ClientError, match="--api-key or QUARTET_API_KEY") as refused:
        check(401, b"{}")
    assert refused.value.status == 401


def test_a_key_that_no_header_can_carry_is_refused():
    with pytest.raises(UsageError, match="no HTTP header"):
        connect("http://localhost:1", "clé")


def test_no_proxy_stands_between_a_program_and_its_own_machine():
    assert client_options("http://localhost:1", None, 1)["trust_env"] is False
    assert client_options("http://127.0.0.1:1", None, 1)["trust_env"] is False
    assert client_options("http://example.org", None, 1)["trust_env"] is True


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (httpx.ConnectError("refused"), "no server answers at http://a (refused); start one with `quartet serve`"),
        (httpx.ConnectTimeout("slow"), "no server answers at http://a"),
        (httpx.ReadTimeout("slow"), "did not answer in time"),
        (httpx.ConnectError("[SSL: CERTIFICATE_VERIFY_FAILED] x"), "is not trusted; SSL_CERT_FILE names"),
        (httpx.RemoteProtocolError("bye"), "the connection to http://a was lost (RemoteProtocolError: bye)"),
    ],
)
def test_a_failure_of_the_network_is_told_in_words(error, said):
    assert said in str(unreachable("http://a/", error))


def answering(body: bytes) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=body))
    return httpx.Client(transport=transport, base_url="http://server")


def test_the_models_of_a_server_are_listed():
    assert served_models(answering(b'{"object": "list", "data": [{"id": "demo"}]}')) == ["demo"]


@pytest.mark.parametrize("body", [b"<html>", b"{}", b"\xff", b'{"data": 3}'])
def test_a_server_of_something_else_is_said_to_be_one(body):
    with pytest.raises(ClientError, match="no server of language models"):
        served_models(answering(body))


@pytest.mark.parametrize(
    "typed", ["http://xn--/", "http://a\x01b/", f"http://{'a' * 70}/", "http://a/?x=1", "http://a/#f"]
)
def test_an_address_that_cannot_be_used_whole_is_refused(typed):
    with pytest.raises(UsageError, match="is no address of a server"):
        base_url(typed)


def test_a_password_in_an_address_is_not_shown():
    assert "secret" not in str(unreachable("http://user:secret@host", httpx.ConnectError("refused")))


def test_a_key_that_no_header_can_carry_is_refused_without_being_shown():
    with pytest.raises(UsageError) as refusal:
        client_options("http://a", "geheim\n", None)
    assert "geheim" not in str(refusal.value)
