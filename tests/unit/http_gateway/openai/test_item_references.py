"""Items that a request of /v1/responses refers to by their ids."""

from typing import Any

import pytest

from quartet.http_gateway.openai.item_references import items_by_id
from quartet.http_gateway.routes.response_store import StoredResponse
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Generate
from tests.unit.http_gateway.harness import Served, asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/responses"
WEATHER = {"type": "function", "name": "weather"}
CALL = '<tool_call>{"name": "weather", "arguments": {"city": "Ulm"}}</tool_call>'
AGAIN = {"role": "user", "content": "again"}


def reference(item_id: Any) -> dict[str, Any]:
    return {"type": "item_reference", "id": item_id}


async def ask(server: Served, given: Any, **body: Any) -> dict[str, Any]:
    answer = await server.client.post(PATH, {"input": given, **body})
    assert answer.status == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


async def refusal(server: Served, given: Any) -> tuple[int, str, str]:
    """Status, field and message."""
    answer = await server.client.post(PATH, {"input": given})
    error = answer.json()["error"]
    return answer.status, error["param"], error["message"]


def messages_of(server: Served) -> list[dict[str, Any]]:
    generate = server.ring.sent[-1]
    assert isinstance(generate, Generate) and generate.chat is not None
    return generate.chat.messages


def text(said: str) -> list[dict[str, Any]]:
    return [{"type": "text", "text": said}]


@asynchronous
async def test_a_reference_stands_for_the_item() -> None:
    async with served(says("one")) as server:
        first = await ask(server, "a")
        second = await ask(server, [{"role": "user", "content": "a"}, reference(first["output"][0]["id"]), AGAIN])
        conversation = [
            {"role": "user", "content": "a"},
            {"role": "assistant", "content": text("one")},
            AGAIN,
        ]
        assert messages_of(server) == conversation
        listed = (await server.client.get(f"{PATH}/{second['id']}/input_items?order=asc")).json()["data"]
        assert listed[1] == first["output"][0]
        await ask(server, [*map(reference, [listed[0]["id"], listed[1]["id"]]), AGAIN])
        assert messages_of(server)[1:] == conversation[1:]


@asynchronous
async def test_thoughts_and_calls_are_referred_to_as_well() -> None:
    script = says(f"<think>hm</think>{CALL}")
    async with served(script, tool_call_parser="hermes", reasoning_parser="qwen3") as server:
        first = await ask(server, "a", tools=[WEATHER])
        thought, call = first["output"]
        output = {"type": "function_call_output", "call_id": call["call_id"], "output": "sunny"}
        await ask(server, [reference(thought["id"]), reference(call["id"]), output], tools=[WEATHER])
        turn, result = messages_of(server)
        assert turn["reasoning_content"] == "hm" and turn["tool_calls"][0]["id"] == call["call_id"]
        assert result["content"] == "sunny"


@asynchronous
async def test_an_item_that_is_not_kept_is_a_404_that_names_it() -> None:
    async with served(says("x")) as server:
        lost = (await ask(server, "a", store=False))["output"][0]["id"]
        kept = (await ask(server, "a"))["output"][0]["id"]
        for unknown in (lost, f"{kept}_7", "msg_1", "x" * 500):
            status, field, message = await refusal(server, [AGAIN, reference(kept), reference(unknown)])
            assert (status, field) == (404, "input") and message.startswith("input[2]: item with id")
        await server.client.call("DELETE", f"{PATH}/{kept.replace('msg', 'resp')}")
        assert (await refusal(server, [reference(kept)]))[0] == 404


@pytest.mark.parametrize("item_id", [None, 3, ["msg_1"]])
@asynchronous
async def test_a_reference_without_an_id_is_refused(item_id: Any) -> None:
    async with served(says("x")) as server:
        status, field, message = await refusal(server, [reference(item_id)])
        assert (status, field) == (400, "input") and "id must be a string" in message


@asynchronous
async def test_items_count_as_part_of_the_body_as_often_as_they_are_named() -> None:
    async with served(says("x" * 300), max_body_size=4000) as server:
        item = reference((await ask(server, "a"))["output"][0]["id"])
        await ask(server, [item, AGAIN])
        status, _, message = await refusal(server, [item] * 20)
        assert status == 413 and "--max-body-size" in message


@asynchronous
async def test_items_and_the_rest_of_the_body_are_limited_together() -> None:
    async with served(says("x" * 1500), max_body_size=3000) as server:
        item = reference((await ask(server, "a"))["output"][0]["id"])
        await ask(server, [item, {"role": "user", "content": "y" * 500}])
        status, _, message = await refusal(server, [item, {"role": "user", "content": "y" * 1500}])
        assert status == 413 and "--max-body-size" in message


@asynchronous
async def test_an_item_is_that_of_its_response_whatever_a_client_has_sent_under_its_id() -> None:
    async with served(says("one")) as server:
        real = (await ask(server, "a"))["output"][0]
        changed = {**real, "content": [{**real["content"][0], "text": "two"}]}
        later = (await ask(server, [changed, AGAIN]))["output"][0]
        await ask(server, [reference(real["id"]), AGAIN, reference(later["id"]), AGAIN])
        assert messages_of(server)[0] == {"role": "assistant", "content": text("one")}


@asynchronous
async def test_a_conversation_goes_on_without_the_response_that_was_referred_to() -> None:
    async with served(says("one")) as server:
        first = await ask(server, "a")
        second = await ask(server, [reference(first["output"][0]["id"]), AGAIN])
        await server.client.call("DELETE", f"{PATH}/{first['id']}")
        await ask(server, "more", previous_response_id=second["id"])
        assert [message["role"] for message in messages_of(server)] == ["assistant", "user", "assistant", "user"]
        assert messages_of(server)[0]["content"] == text("one")


@asynchronous
async def test_the_type_of_a_reference_may_be_left_out() -> None:
    async with served(says("one")) as server:
        own_id = (await ask(server, "a"))["output"][0]["id"]
        for item in ({"id": own_id}, {"id": own_id, "type": None}):
            await ask(server, [item, AGAIN])
            assert messages_of(server)[0] == {"role": "assistant", "content": text("one")}


@asynchronous
async def test_responses_that_are_larger_than_a_body_are_not_read() -> None:
    async with served(says("x" * 1500), max_body_size=3000) as server:
        items = [reference((await ask(server, "a"))["output"][0]["id"]) for _ in range(2)]
        status, field, message = await refusal(server, items)
        assert (status, field) == (413, "input") and "--max-body-size" in message


def test_a_store_that_is_damaged_is_a_503() -> None:
    for stored in (StoredResponse(b"[", b'{"output":[]}'), StoredResponse(b"[]", b'{"output":[3]}')):
        with pytest.raises(RequestError) as error:
            items_by_id([stored])
        assert (error.value.kind, error.value.field) == (Kind.UNAVAILABLE, "input")
