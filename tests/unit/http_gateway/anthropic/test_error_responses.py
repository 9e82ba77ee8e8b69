"""Errors as clients of Anthropic's API read them."""

from typing import Any

import pytest
from anthropic.types.shared import ErrorResponse

from quartet.http_gateway.anthropic.error_responses import TYPES
from quartet.http_gateway.app import ENDPOINTS
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import Kind
from quartet.runtime.messages import Finish, Reply
from tests.unit.http_gateway.harness import Answer, asynchronous, ends, served
from tests.unit.http_gateway.openai_scripts import says

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8}
VERSION = {"anthropic-version": "2023-06-01"}
TOO_LARGE = "request_too_large"  # which the client has no type for


def error_of(answer: Answer) -> tuple[int, str, str]:
    """Status, type and message."""
    body = answer.json()
    assert body["request_id"] == answer.headers["request-id"]
    if body["error"]["type"] != TOO_LARGE:
        ErrorResponse.model_validate(body)
    assert body.keys() == {"type", "error", "request_id"} and body["type"] == "error"
    return answer.status, body["error"]["type"], body["error"]["message"]


@pytest.mark.parametrize("path", [PATH, COUNT])
@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"{", "Invalid request body"),
        (b'{"messages": [], "max_tokens": 1, "x": "\xff"}', "Invalid request body"),
        ({"max_tokens": 1}, "`messages`"),
        ({**BODY, "messages": []}, "Messages cannot be empty"),
        ({**BODY, "messages": [{"role": "robot", "content": "a"}]}, "$.messages[0].role"),
        ({**BODY, "messages": [{"role": "user", "content": [{"type": "audio"}]}]}, "'audio'"),
        ({**BODY, "messages": [{"role": "user", "content": [{"type": "image"}]}]}, "'image' are not supported"),
        ({**BODY, "tool": []}, "did you mean `tools`?"),
        ({**BODY, "thinkin": {}}, "did you mean `thinking`?"),
        ({**BODY, "tool_choice": {"type": "any"}}, "tool"),
        ({**BODY, "tool_choice": {"type": "tool", "name": "f"}}, "'f'"),
    ],
)
@asynchronous
async def test_a_bad_body_is_a_400_that_names_the_fault(path: str, body: Any, expected: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(path, body)
        status, kind, message = error_of(answer)
        assert (status, kind) == (400, "invalid_request_error") and expected in message


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        ({"max_tokens": None}, "$.max_tokens"),
        ({"max_tokens": -1}, "$.max_tokens"),
        ({"max_token": 3}, "did you mean `max_tokens`?"),
        ({"stop_sequence": ["a"]}, "did you mean `stop_sequences`?"),
        ({"temperature": -1}, "temperature"),
        ({"top_k": -5}, "top_k"),
        ({"thinking": {"type": "enabled"}}, "budget_tokens is required"),
        ({"output_config": {"format": {"type": "json_schema"}}}, "`schema`"),
        ({"output_format": {"type": "json_schema"}}, "`schema`"),
    ],
)
@asynchronous
async def test_a_bad_field_of_messages_is_a_400_that_names_it(more: dict[str, Any], expected: str) -> None:
    async with served(says("x")) as server:
        status, kind, message = error_of(await server.client.post(PATH, BODY | more))
        assert (status, kind) == (400, "invalid_request_error") and expected in message


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_client_learns_from_the_code_that_there_are_no_threads(stream: bool) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {**BODY, "stream": stream, "thread": {"type": "create"}})
        status, kind, message = error_of(answer)
        assert (status, kind) == (400, "invalid_request_error") and message.startswith("thread is not supported")
        details = {"error_code": "thread_unsupported_request", "unsupported": ["thread"]}
        assert answer.json()["error"]["details"] == details
        other = (await server.client.post(PATH, {**BODY, "messages": []})).json()["error"]
        assert other.keys() == {"type", "message"}


@pytest.mark.parametrize(
    ("finish", "status", "kind", "expected"),
    [
        ({"status": 400, "message": "no"}, 400, "invalid_request_error", "no"),
        ({"status": 429, "message": "no"}, 429, "rate_limit_error", "no"),
        ({"status": 500, "message": "no"}, 500, "api_error", "no"),
        ({"status": 503, "message": "no"}, 503, "overloaded_error", "no"),
        (
            {"status": 400, "message": "9 > 8", "field": "prompt", "code": "context_length_exceeded"},
            400,
            "invalid_request_error",
            "prompt is too long: 9 > 8",
        ),
        (
            {"status": 400, "message": "max_new_tokens is too much", "field": "max_new_tokens"},
            400,
            "invalid_request_error",
            "max_tokens is too much",
        ),
        (
            {"status": 400, "message": "Failed to compile call_grammar grammar: no", "field": "call_grammar"},
            400,
            "invalid_request_error",
            "Failed to compile tools grammar: no",
        ),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_errors_of_the_ring_keep_their_status(
    finish: dict[str, Any], status: int, kind: str, expected: str, stream: bool
) -> None:
    async with served(ends(Finish(reason="error", **finish))) as server:
        answer = await server.client.post(PATH, {**BODY, "stream": stream})
        assert error_of(answer) == (status, kind, expected)
        assert ("retry-after" in answer.headers) == (status in (429, 503))


@asynchronous
async def test_a_body_that_is_too_large_is_a_413() -> None:
    async with served(max_body_size=1000) as server:
        answer = await server.client.post(PATH, {**BODY, "system": "a" * 2000})
        status, kind, message = error_of(answer)
        assert (status, kind) == (413, TOO_LARGE) and "--max-body-size" in message


@pytest.mark.parametrize("path", [PATH, COUNT, "/v1/nothing"])
@asynchronous
async def test_a_missing_key_is_a_401(path: str) -> None:
    async with served(says("x"), api_key="k") as server:
        answer = await server.client.post(path, BODY, headers=VERSION)
        assert error_of(answer)[:2] == (401, "authentication_error")
        assert answer.headers["www-authenticate"] == "Bearer"


@asynchronous
async def test_a_request_of_a_foreign_page_is_a_403() -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, BODY, headers={"origin": "http://evil.example"})
        assert error_of(answer)[:2] == (403, "permission_error")


@asynchronous
async def test_an_unknown_path_is_a_404_in_the_shape_of_the_client_s_api() -> None:
    async with served() as server:
        answer = await server.client.post("/v1/messages/batches", BODY, headers=VERSION)
        assert error_of(answer)[:2] == (404, "not_found_error")
        for path in ("/v1/messages/batches", "/v1/messages/x/y"):
            assert error_of(await server.client.post(path, BODY))[:2] == (404, "not_found_error")
        assert (await server.client.post("/v1/messagesx", BODY)).json()["object"] == "error", "of OpenAI's API"
        assert error_of(await server.client.post("/v1/nope", BODY, headers=VERSION))[:2] == (404, "not_found_error")


@pytest.mark.parametrize("path", [PATH, COUNT])
@asynchronous
async def test_a_wrong_method_and_an_unknown_host_are_told_in_the_shape_of_this_api(path: str) -> None:
    async with served() as server:
        answer = await server.client.get(path)
        assert error_of(answer) == (405, "invalid_request_error", "Method Not Allowed")
        assert answer.headers["allow"] == "POST"
        answer = await server.client.post(path, BODY, headers={"host": "evil.example"})
        assert error_of(answer)[:2] == (403, "permission_error") and "--allowed-hosts" in answer.text
        answer = await server.client.post(path, BODY, headers={"host": "a b"})
        assert error_of(answer)[:2] == (400, "invalid_request_error")


@asynchronous
async def test_other_routes_keep_their_shapes_for_wrong_methods_and_hosts() -> None:
    async with served() as server:
        assert (await server.client.get("/v1/chat/completions")).json() == {"detail": "Method Not Allowed"}
        answer = await server.client.get("/v1/models", headers={"host": "evil.example"})
        assert answer.status == 403 and answer.json()["object"] == "error"
        answer = await server.client.get("/v1/models", headers={"host": "evil.example", **VERSION})
        assert error_of(answer)[:2] == (403, "permission_error")


@asynchronous
async def test_a_count_that_is_refused_says_the_same_as_the_message() -> None:
    async with served() as server:
        server.ring.answers_commands = False
        call = server.client.start("POST", COUNT, BODY)
        [command] = await server.ring.sent_of(Tokenize)
        code = "context_length_exceeded"
        refusal = Reply(id=command.id, success=False, status=400, message="9 > 8", field="text", code=code)
        server.ring.push(refusal)
        assert error_of(await call.answer()) == (400, "invalid_request_error", "prompt is too long: 9 > 8")


@asynchronous
async def test_an_embedding_model_does_not_serve_messages() -> None:
    async with served(is_embedding=True) as server:
        for path in (PATH, COUNT):
            assert error_of(await server.client.post(path, BODY))[0] == 400


@asynchronous
async def test_the_request_id_of_the_client_is_used() -> None:
    async with served() as server:
        answer = await server.client.post(PATH, {}, headers={"x-request-id": "mine"})
        assert (answer.json()["request_id"], answer.headers["request-id"]) == ("mine", "mine")


def test_every_kind_of_error_has_a_type() -> None:
    assert {kind.status for kind in Kind} == TYPES.keys()


def test_every_route_of_this_api_has_its_shape_for_all_errors() -> None:
    own = {endpoint.path for endpoint in ENDPOINTS if endpoint.own_shape({"headers": [(b"anthropic-version", b"")]})}
    assert own == {PATH, COUNT, "/v1/models", "/v1/models/{model:path}"}
