"""/v1/responses/input_tokens from the client's side, on a ring that answers in process."""

import asyncio
from typing import Any

import pytest
from openai.types.responses.input_token_count_response import InputTokenCountResponse

from quartet.runtime.control import Tokenize
from quartet.runtime.messages import Generate, Reply, pack_ids
from tests.unit.http_gateway.harness import Answer, Served, asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

PATH, COUNT = "/v1/responses", "/v1/responses/input_tokens"
TOOL = {"type": "function", "name": "weather", "parameters": {"type": "object", "properties": {}}}
NAMESPACE = {"type": "namespace", "name": "agents", "tools": [{"type": "function", "name": "close"}]}


async def counted(server: Served, body: dict[str, Any]) -> tuple[Tokenize, Answer]:
    """The command that asks the tokenizer, and the answer."""
    server.ring.answers_commands = False
    call = asyncio.create_task(server.client.post(COUNT, body))
    [sent] = await server.ring.sent_of(Tokenize)
    server.ring.push(Reply(id=sent.id, body={"tokens": [pack_ids([1, 2, 3])]}))
    return sent, await call


@pytest.mark.parametrize(
    "fields",
    [
        {"input": "hi"},
        {"input": [{"role": "user", "content": "hi"}], "instructions": "Be brief."},
        {"input": "hi", "tools": [TOOL, NAMESPACE], "tool_choice": "none"},
        {"input": "hi", "tools": [TOOL], "reasoning": {"effort": "low"}, "text": {"format": {"type": "text"}}},
    ],
)
@asynchronous
async def test_it_counts_the_prompt_that_a_response_has(fields: dict[str, Any]) -> None:
    async with served(says("x")) as server:
        assert (await server.client.post(PATH, fields)).status == 200
        [generate] = await server.ring.sent_of(Generate)
        sent, answer = await counted(server, fields)
        found = InputTokenCountResponse.model_validate_json(answer.text, strict=True)
        assert (found.object, found.input_tokens) == ("response.input_tokens", 3)
        assert sent.chat == generate.chat


@asynchronous
async def test_it_counts_a_conversation_that_was_kept() -> None:
    async with served(says("Ulm.")) as server:
        kept = (await server.client.post(PATH, {"input": "Where?"})).json()
        sent, answer = await counted(server, {"previous_response_id": kept["id"]})
        assert answer.status == 200 and sent.chat is not None
        assert [message["content"][0]["text"] for message in sent.chat.messages] == ["Where?", "Ulm."]


@pytest.mark.parametrize(
    ("fields", "status", "field"),
    [
        ({}, 400, "input"),
        ({"input": "hi", "tools": [{"type": "mcp"}]}, 400, "tools"),
        ({"input": "hi", "previous_response_id": "resp_x"}, 400, "previous_response_id"),
        ({"input": [{"type": "item_reference", "id": "msg_x"}]}, 404, "input"),
    ],
)
@asynchronous
async def test_what_a_response_refuses_is_refused(fields: dict[str, Any], status: int, field: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(COUNT, fields)
        assert (answer.status, answer.json()["error"]["param"]) == (status, field)


@asynchronous
async def test_it_says_which_tools_are_left_out() -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        sent, answer = await counted(server, {"input": "hi", "tools": [TOOL, {"type": "web_search"}]})
        assert "web_search" in answer.headers["warning"]
        assert sent.chat is not None and len(sent.chat.tools or ()) == 1
