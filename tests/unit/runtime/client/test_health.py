"""What is printed of a server whose state is known."""

import itertools
import math

import httpx
import pytest

from quartet.runtime.client.connection import ClientError
from quartet.runtime.client.health import Verdict, ask, parse_samples, report

EXPOSITION = """\
# TYPE quartet:restarts counter
quartet:restarts_total{role="gateway"} 0.0
quartet:restarts_total{role="tokenizer"} 1.0
quartet:restarts_total{role="scheduler"} 2.0
quartet:restarts_total{role="detokenizer"} 0.0
sglang:num_running_reqs{engine_type="unified",model_name="demo"} 3.0
sglang:token_usage{model_name="a \\"b\\" c"} 0.25
sglang:odd 1e-3
broken line
"""
OK, SAMPLES = Verdict(), parse_samples(EXPOSITION)


def test_a_healthy_server_has_a_line_and_one_for_each_process():
    assert report("http://a", OK, OK, SAMPLES) == [
        "http://a is healthy",
        "  gateway      runs, 0 restarts",
        "  tokenizer    runs, 1 restart",
        "  scheduler    runs, 2 restarts, 3 running, KV pool 25% used",
        "  detokenizer  runs, 0 restarts",
    ]


def test_a_process_is_told_by_its_id():
    ids = 'quartet:process_pid{role="launcher"} 4709.0\nquartet:process_pid{role="gateway"} 1.234567e+06\n'
    lines = report("http://a", OK, OK, parse_samples(EXPOSITION + ids))
    assert lines[1:3] == ["  gateway      runs, 0 restarts, pid 1234567", "  tokenizer    runs, 1 restart"]


def test_a_reason_stands_at_the_process_that_it_names():
    lines = report("http://a", Verdict("unhealthy", "the tokenizer has not run for 9 s"), OK, SAMPLES)
    assert lines[0] == "http://a is unhealthy: the tokenizer has not run for 9 s"
    assert lines[2] == "  tokenizer    the tokenizer has not run for 9 s, 1 restart"


def test_a_server_may_be_healthy_and_take_no_requests():
    ready = Verdict("unhealthy", "the scheduler is being started again")
    assert report("http://a", OK, ready, {}) == [
        "http://a is healthy, takes no requests: the scheduler is being started again"
    ]


FAR = math.inf  # on the clock


def answering(status: int, body: bytes, headers: dict[str, str] | None = None) -> httpx.Client:
    transport = httpx.MockTransport(lambda request: httpx.Response(status, content=body, headers=headers))
    return httpx.Client(transport=transport, base_url="http://server")


def endless(part: bytes) -> httpx.Client:
    """A server whose answer goes on for ever."""
    transport = httpx.MockTransport(lambda request: httpx.Response(200, content=itertools.repeat(part)))
    return httpx.Client(transport=transport, base_url="http://server")


@pytest.mark.parametrize(
    ("status", "body", "state"),
    [
        (200, b"", "healthy"),
        (200, b'{"status":"ok"}', "ok"),
        (200, b'{"status":"resting","reason":"generation is paused"}', "resting"),
        (503, b'{"status":"unhealthy","reason":"x"}', "unhealthy"),
        (503, b"", "unhealthy"),
    ],
)
def test_the_state_is_read_from_the_status_and_the_body(status, body, state):
    assert ask(answering(status, body), "/health", FAR).status == state


def test_another_failure_is_an_error():
    with pytest.raises(ClientError, match="HTTP 500"):
        ask(answering(500, b""), "/health", FAR)


@pytest.mark.parametrize(
    ("status", "content", "kind"),
    [(404, b"nothing", "text/plain"), (302, b"", "text/plain"), (200, b"<html>", "text/html; charset=utf-8")],
)
def test_what_is_no_server_of_models_is_not_healthy(status, content, kind):
    with pytest.raises(ClientError):
        ask(answering(status, content, {"content-type": kind}), "/health", FAR)


def test_a_path_that_servers_may_lack_may_be_missing():
    assert ask(answering(404, b""), "/readyz", FAR, optional=True).status == "healthy"


def test_an_answer_without_an_end_is_given_up_by_its_size():
    with pytest.raises(ClientError, match="more than 16777216 bytes"):
        ask(endless(b"x" * 100_000), "/health", FAR)


def test_an_answer_that_trickles_is_given_up_in_time():
    with pytest.raises(ClientError, match="in time"):
        ask(endless(b"x"), "/health", deadline_s=0.0)


def test_numbers_that_are_none_are_left_out():
    text = 'quartet:restarts_total{role="gateway"} NaN\nquartet:restarts_total{role="tokenizer"} 1e400\n'
    assert parse_samples(text) == {}
