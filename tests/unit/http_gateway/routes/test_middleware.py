"""What every request meets at the edge of the application."""

import asyncio
import logging
from collections.abc import Callable
from typing import Any

import pytest

from quartet.http_gateway.routes.gateway import Phase
from quartet.runtime.limits import MAX_LOGGED_TEXT_CHARS
from quartet.runtime.messages import Generate
from tests.unit.http_gateway.harness import asynchronous, served, words


@asynchronous
async def test_unknown_paths_wrong_methods_and_trailing_slashes() -> None:
    async with served() as server:
        missing = await server.client.get("/nope")
        assert (missing.status, missing.json()) == (404, {"detail": "Not Found"})
        wrong = await server.client.get("/generate")
        assert (wrong.status, wrong.json()) == (405, {"detail": "Method Not Allowed"})
        slash = await server.client.get("/get_load/?a=b", headers={"host": "localhost"})
        assert (slash.status, slash.headers["location"]) == (307, "/get_load?a=b")
        assert (await server.client.call("HEAD", "/")).status == 200
        assert (await server.client.call("HEAD", "/get_load")).status == 405


@asynchronous
async def test_what_no_route_takes_under_v1_is_told_in_the_shape_of_openai() -> None:
    async with served() as server:
        missing = await server.client.post("/v1/audio/speech", {})
        said = missing.json()
        assert missing.status == 404 and said["detail"] == "Not Found"
        assert said["error"]["message"] == said["message"] == "Invalid URL (POST /v1/audio/speech)"
        assert (said["object"], said["error"]["type"], said["error"]["code"]) == ("error", "NotFoundError", 404)
        assert len((await server.client.get("/v1/" + "x" * 5000)).text) < 2000


@pytest.mark.parametrize(
    ("settings", "size", "status"),
    [
        ({}, 8 << 20, 200),
        ({}, (8 << 20) + 1, 413),
        ({}, 200 << 20, 413),
        ({"max_body_size": 64}, 64, 200),
        ({"max_body_size": 64}, 65, 413),
    ],
)
@asynchronous
async def test_a_body_over_the_limit_is_a_413_that_names_it_and_its_flag(
    settings: dict[str, int], size: int, status: int
) -> None:
    async with served(words("x"), **settings) as server:
        body = b'{"text":"a"}'
        sent = body + b" " * (size - len(body)) if size < (9 << 20) else body
        answer = await server.client.post("/generate", sent, headers={"content-length": str(size)})
        assert answer.status == status
        if status != 200:
            limit = settings.get("max_body_size", 8 << 20)
            expected = f"The request body exceeds the limit of {limit} bytes (--max-body-size)."
            assert answer.json()["error"]["message"] == expected


@asynchronous
async def test_a_head_over_the_limit_is_a_431() -> None:
    async with served() as server:
        answer = await server.client.get("/health", headers={"x-big": "x" * (17 << 10)})
        assert answer.status == 431


@asynchronous
async def test_request_ids_are_echoed_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as server:
        with caplog.at_level(logging.INFO, "http_gateway.access"):
            answer = await server.client.get("/get_model_info?x=1", headers={"x-request-id": "abc-1"})
            await server.client.get("/health")
            await server.client.get("/livez")
        assert answer.headers["x-request-id"] == "abc-1"
        assert [record.getMessage() for record in caplog.records] == [
            'INFO:     127.0.0.1:40466 - "GET /get_model_info HTTP/1.1" 200 OK request-id=abc-1',
            'INFO:     127.0.0.1:40466 - "GET /health HTTP/1.1" 200 OK',
        ]


@asynchronous
async def test_no_new_requests_while_draining() -> None:
    async with served(words("x")) as server:
        server.gateway.ring.closing = True
        answer = await server.client.post("/generate", {"text": "hi"})
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")


@asynchronous
async def test_query_strings_are_not_logged_and_a_quote_ends_no_request(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as server:
        with caplog.at_level(logging.INFO, "http_gateway.access"):
            await server.client.get('/nope"x?api_key=s3cr3t')
            await server.client.get("/get_load/?token=s3cr3t")
        assert "s3cr3t" not in caplog.text
        assert '"GET /nope%22x HTTP/1.1" 404' in caplog.text


@asynchronous
async def test_health_checks_are_logged_when_their_answer_is_another_one(caplog: pytest.LogCaptureFixture) -> None:
    async with served() as server:
        with caplog.at_level(logging.INFO, "http_gateway.access"):
            for phase in (Phase.UP, Phase.UP, Phase.DRAINING, Phase.DRAINING, Phase.UP):
                server.gateway.phase = phase
                for path in ("/health", "/ping", "/readyz", "/metrics"):
                    await server.client.get(path)
        lines = [record.getMessage() for record in caplog.records]
        assert [line.partition("/1.1")[2] for line in lines] == ['" 200 OK', '" 503 Service Unavailable', '" 200 OK']


@asynchronous
async def test_what_the_page_asks_by_itself_is_logged_only_where_it_is_refused(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with served(api_key="k") as server:
        with caplog.at_level(logging.INFO, "http_gateway.access"):
            for headers in ({"authorization": "Bearer k"}, {}):
                for path in ("/server_info", "/page/app.js"):
                    await server.client.get(path, headers=headers)
        lines = [record.getMessage() for record in caplog.records]
        assert [line.partition('"')[2] for line in lines] == ['GET /server_info HTTP/1.1" 401 Unauthorized']


@pytest.fixture
def ended(caplog: pytest.LogCaptureFixture) -> Callable[[], list[dict[str, Any]]]:
    """The lines of the request log, as their fields."""
    caplog.set_level(logging.INFO, "http_gateway.requests")
    return lambda: [record.__dict__["fields"] for record in caplog.records if record.name == "http_gateway.requests"]


@asynchronous
async def test_without_a_request_log_nothing_is_noted_of_a_request(ended: Callable[[], list[dict[str, Any]]]) -> None:
    async with served(words("a", "b")) as server:
        await server.client.post("/generate", {"text": "hi"})
    assert ended() == []


@asynchronous
async def test_a_request_is_one_line_at_its_end_and_shows_no_text(
    ended: Callable[[], list[dict[str, Any]]], caplog: pytest.LogCaptureFixture
) -> None:
    async with served(words("secret answer", "b"), log_requests="metadata", api_key="s3cr3t") as server:
        key = {"authorization": "Bearer s3cr3t", "x-request-id": "mine"}
        await server.client.post("/generate", {"text": "secret prompt", "rid": "r1"}, headers=key)
        await server.client.post("/v1/completions", {"prompt": "x", "stream": True}, headers=key)
        await server.client.post("/generate", {"text": 7}, headers=key)
        await server.client.post("/generate", {"text": "x"})
        await server.client.get("/get_model_info", headers=key)
    first, streamed, wrong, refused = ended()
    assert (first["id"], first["request_id"], first["route"], first["status"]) == ("r1", "mine", "/generate", 200)
    assert (first["finish"], first["prompt_tokens"], first["output_tokens"]) == ("stop", 3, 2)
    assert 0 <= first["first_token_s"] <= first["total_s"]
    assert (streamed["route"], streamed["output_tokens"]) == ("/v1/completions", 2)
    assert (wrong["status"], wrong["requests"], refused["status"]) == (400, 0, 401)
    assert "secret" not in caplog.text and "s3cr3t" not in caplog.text


@asynchronous
async def test_the_full_request_log_shows_the_beginnings_of_texts(ended: Callable[[], list[dict[str, Any]]]) -> None:
    async with served(words("an answer", "."), log_requests="full") as server:
        await server.client.post("/generate", {"text": ["short", "x" * 5000]})
    [said] = ended()
    assert said["prompts"] == ["short", "x" * MAX_LOGGED_TEXT_CHARS + "..."]
    assert said["outputs"] == ["an answer.", "an answer."]
    assert (said["requests"], len(said["id"])) == (2, 2)


@asynchronous
async def test_a_client_that_leaves_is_a_499_in_the_request_log(ended: Callable[[], list[dict[str, Any]]]) -> None:
    async with served(log_requests="metadata") as server:
        gone = asyncio.Event()
        call = server.client.start("POST", "/generate", {"text": "hi"}, gone=gone)
        await server.ring.sent_of(Generate)
        gone.set()
        await call.answer()
    [said] = ended()
    assert (said["status"], said["finish"]) == (499, "abort")
