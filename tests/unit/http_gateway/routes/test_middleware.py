"""What every request meets at the edge of the application."""

import logging

import pytest

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
        assert (await server.client.call("HEAD", "/health")).status == 405


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
