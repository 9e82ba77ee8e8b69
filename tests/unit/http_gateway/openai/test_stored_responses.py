"""Responses that are kept, from the client's side."""

import json
from typing import Any

import pytest
from openai.types import responses as sdk
from pydantic import TypeAdapter

from quartet.http_gateway.openai.response_history import items_in
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, Generate
from tests.unit.http_gateway.harness import Answer, Served, asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
ITEMS: TypeAdapter[Any] = TypeAdapter(list[sdk.ResponseItem])


async def ask(server: Served, given: Any = "hi", **body: Any) -> dict[str, Any]:
    answer = await server.client.post(PATH, {"input": given, **body})
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def get(server: Served, path: str) -> Answer:
    return await server.client.get(f"{PATH}/{path}")


def messages_of(server: Served) -> list[dict[str, Any]]:
    generate = server.ring.sent[-1]
    assert isinstance(generate, Generate) and generate.chat is not None
    return generate.chat.messages


def text(said: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": said}]


@asynchronous
async def test_a_stored_response_is_the_one_that_was_answered() -> None:
    async with served(says("Paris.")) as server:
        body = await ask(server, metadata={"a": "b"})
        assert (await get(server, body["id"])).json() == body and body["store"] is True
        *_, last = (await server.client.post(PATH, {"input": "hi", "stream": True})).text.splitlines()[:-1]
        response = json.loads(last.removeprefix("data: "))["response"]
        assert (await get(server, response["id"])).json() == response


@asynchronous
async def test_a_conversation_goes_on_from_a_response() -> None:
    async with served(says("one")) as server:
        first = await ask(server, "a", instructions="be brief")
        second = await ask(server, "b", previous_response_id=first["id"])
        assert second["previous_response_id"] == first["id"]
        await ask(server, "c", previous_response_id=second["id"], instructions="be long")
        assert messages_of(server) == [
            {"role": "system", "content": "be long"},
            {"role": "user", "content": text("a")},
            {"role": "assistant", "content": text("one")},
            {"role": "user", "content": text("b")},
            {"role": "assistant", "content": text("one")},
            {"role": "user", "content": "c"},
        ]


@asynchronous
async def test_the_output_of_a_call_goes_on_from_the_response_with_the_call() -> None:
    async with served(says(CALL), tool_call_parser="hermes") as server:
        first = await ask(server, tools=[WEATHER])
        [call] = first["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        await ask(server, [output], previous_response_id=first["id"], tools=[WEATHER])
        _, turn, result = messages_of(server)
        assert turn["tool_calls"][0]["id"] == call["call_id"] and turn["content"] is None
        assert result == {"role": "tool", "tool_call_id": call["call_id"], "content": "sunny"}


@asynchronous
async def test_a_call_that_was_cut_off_is_no_part_of_the_conversation() -> None:
    cut = says(CALL[:60], finish=Finish(reason="length", length=1))
    async with served(cut, tool_call_parser="hermes") as server:
        first = await ask(server, "a", tools=[WEATHER])
        assert first["output"][0]["type"] == "function_call" and first["status"] == "incomplete"
        await ask(server, "b", previous_response_id=first["id"])
        assert [message["role"] for message in messages_of(server)] == ["user", "user"]


@asynchronous
async def test_nothing_is_kept_of_a_response_that_is_not_to_be_stored() -> None:
    async with served(says("x")) as server:
        body = await ask(server, store=False)
        assert body["store"] is False and (await get(server, body["id"])).status == 404
        answer = await server.client.post(PATH, {"input": "b", "previous_response_id": body["id"]})
        error = answer.json()["error"]
        assert (answer.status, error["param"], error["code"]) == (
            *(400, "previous_response_id"),
            "previous_response_not_found",
        )


@asynchronous
async def test_a_server_without_a_store_says_that_it_keeps_nothing() -> None:
    async with served(says("x"), responses_store_size=0) as server:
        assert (await ask(server))["store"] is False


@asynchronous
async def test_a_response_is_answered_where_the_store_has_failed() -> None:
    async with served(says("x")) as server:
        server.gateway.stored_responses.close()
        assert (await ask(server))["store"] is False
        assert (await get(server, "resp_1")).status == 503


@asynchronous
async def test_a_deleted_response_is_gone() -> None:
    async with served(says("x")) as server:
        path = f"{PATH}/{(await ask(server))['id']}"
        assert (await server.client.call("DELETE", path)).json()["deleted"] is True
        assert (await server.client.call("DELETE", path)).status == 404
        assert (await server.client.get(path)).status == 404


@asynchronous
async def test_only_a_response_that_is_there_is_refused_to_be_cancelled() -> None:
    async with served(says("x")) as server:
        assert (await server.client.post(f"{PATH}/resp_1/cancel")).status == 404
        answer = await server.client.post(f"{PATH}/{(await ask(server))['id']}/cancel")
        assert answer.status == 400 and "cancelled" in answer.json()["error"]["message"]


@asynchronous
async def test_the_items_of_a_request_are_listed_page_by_page() -> None:
    given = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b"},
        {"type": "function_call", "id": "fc_1", "call_id": "1", "name": "weather", "arguments": "{}"},
        {"type": "function_call_output", "call_id": "1", "output": "sunny"},
        {"role": "user", "content": [{"type": "input_text", "text": "c"}], "id": "fc_1"},
    ]
    async with served(says("x")) as server:
        path = f"{(await ask(server, given))['id']}/input_items"
        listed = (await get(server, f"{path}?order=asc")).json()
        ITEMS.validate_python(listed["data"])
        assert [item["type"] for item in listed["data"]] == [
            *("message", "message", "function_call", "function_call_output", "message"),
        ]
        ids = [item["id"] for item in listed["data"]]
        assert len(set(ids)) == 5 and ids[2] == "fc_1"
        assert listed["data"][0]["content"] == [{"type": "input_text", "text": "a"}]
        assert (listed["first_id"], listed["last_id"], listed["has_more"]) == (ids[0], ids[-1], False)
        page = (await get(server, f"{path}?limit=2&after={ids[3]}")).json()
        assert [item["id"] for item in page["data"]] == [ids[2], ids[1]] and page["has_more"] is True


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("/input_items?limit=0", "limit"),
        ("/input_items?limit=x", "limit"),
        ("/input_items?order=up", "order"),
        ("/input_items?after=none", "after"),
        ("/input_items?include=message.output_text.logprobs", "include"),
        ("?stream=true", "stream"),
        ("?include[]=message.output_text.logprobs", "include"),
    ],
)
@asynchronous
async def test_a_wrong_query_is_refused(query: str, param: str) -> None:
    async with served(says("x")) as server:
        answer = await get(server, (await ask(server))["id"] + query)
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)


@asynchronous
async def test_a_conversation_counts_as_part_of_the_body() -> None:
    async with served(says("x"), max_body_size=4000) as server:
        first = await ask(server, "a" * 1500)
        answer = await server.client.post(PATH, {"input": "b" * 1500, "previous_response_id": first["id"]})
        assert answer.status == 200
        body = {"input": "c", "previous_response_id": answer.json()["id"]}
        assert (await server.client.post(PATH, body)).status == 413


def test_a_conversation_that_the_store_has_damaged_is_refused() -> None:
    for stored in (StoredResponse(b"[", b'{"output":[]}'), StoredResponse(b"[]", b'{"output":3}')):
        with pytest.raises(RequestError) as error:
            items_in([stored])
        assert (error.value.kind, error.value.field) == (Kind.UNAVAILABLE, "previous_response_id")
