"""POST /v1/messages and its token counts; the client's own types read what is answered."""

import asyncio
import json
from typing import Any

import pytest
from anthropic.types import Message, MessageTokensCount, RawMessageStreamEvent
from pydantic import TypeAdapter

from quartet.http_gateway.routes.gateway import Phase
from quartet.runtime.control import Tokenize
from quartet.runtime.messages import Finish, Generate, Reply, pack_ids
from tests.unit.http_gateway.harness import Answer, asynchronous, ends, served, step
from tests.unit.http_gateway.openai_scripts import says

PATH, COUNT = "/v1/messages", "/v1/messages/count_tokens"
BODY: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 8, "model": "m"}
TOOL = {"name": "f", "input_schema": {"type": "object"}}
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": [1, 2]}}\n</tool_call>'
READ: TypeAdapter[Any] = TypeAdapter(RawMessageStreamEvent)


def message_of(answer: Answer) -> Message:
    """The answer, read strictly."""
    assert answer.status == 200, answer.text
    assert answer.headers["request-id"].startswith("req_")
    return Message.model_validate(answer.json())


def events_of(answer: Answer) -> list[Any]:
    """The events of a stream, read strictly; without pings."""
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for frame in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = frame.split("\n")
        event = json.loads(data.removeprefix("data: "))
        assert name == f"event: {event['type']}"
        if event["type"] != "ping":
            found.append(READ.validate_python(event))
    return found


# whole


@pytest.mark.parametrize("name", ["output_config", "output_format"])
@asynchronous
async def test_a_demanded_call_has_the_form_of_its_arguments_not_of_a_text(name: str) -> None:
    form: dict[str, Any] = {"type": "json_schema", "schema": {"type": "object"}}
    fields = {"output_format": form} if name == "output_format" else {"output_config": {"format": form}}
    async with served(says(CALL), tool_call_parser="hermes") as server:
        for choice in ({"type": "any"}, {"type": "tool", "name": "f"}):
            message_of(await server.client.post(PATH, {**BODY, **fields, "tools": [TOOL], "tool_choice": choice}))
            generate = server.ring.sent[-1]
            assert isinstance(generate, Generate)
            params = generate.request.params
            assert params.call_grammar is not None and not params.json_schema


@asynchronous
async def test_a_message_has_content_usage_and_stop_reason() -> None:
    async with served(says("Par", "is.", prompt_tokens=30, cached_tokens=16)) as server:
        answer = message_of(await server.client.post(PATH, BODY))
        [block] = answer.content
        assert block.type == "text" and block.text == "Paris."
        assert (answer.model, answer.role, answer.stop_reason, answer.stop_sequence) == (
            "m",
            "assistant",
            "end_turn",
            None,
        )
        used = answer.usage
        assert (used.input_tokens, used.cache_read_input_tokens, used.cache_creation_input_tokens) == (14, 16, 0)
        assert used.output_tokens == 2 and answer.id.startswith("msg_")
        [generate] = await server.ring.sent_of(Generate)
        assert generate.chat.messages == BODY["messages"] and generate.request.params.max_new_tokens == 8


@pytest.mark.parametrize(
    ("finish", "asked", "reason", "sequence"),
    [
        (Finish(reason="stop", matched=2), {}, "end_turn", None),
        (Finish(reason="stop", matched=" is"), {"stop_sequences": ["x", " is"]}, "stop_sequence", " is"),
        (Finish(reason="stop", matched=" is"), {}, "end_turn", None),
        (Finish(reason="length", length=2), {"max_tokens": 2}, "max_tokens", None),
        (Finish(reason="length", length=2), {"max_tokens": 3}, "model_context_window_exceeded", None),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_stop_reasons(finish: Finish, asked: Any, reason: str, sequence: Any, stream: bool) -> None:
    async with served(says("a", "b", finish=finish)) as server:
        answer = await server.client.post(PATH, {**BODY, **asked, "stream": stream})
        message = events_of(answer)[-2].delta if stream else message_of(answer)
        assert (message.stop_reason, message.stop_sequence) == (reason, sequence)


@pytest.mark.parametrize("max_tokens", [8, 32000])
@asynchronous
async def test_a_limit_beyond_the_context_is_what_is_left_of_it(max_tokens: int) -> None:
    async with served(says("a", finish=Finish(reason="length", length=1))) as server:
        answer = message_of(await server.client.post(PATH, {**BODY, "max_tokens": max_tokens}))
        request = server.ring.sent[-1].request
        assert request.clips_output and request.params.max_new_tokens == min(max_tokens, 512)  # the context
        assert answer.stop_reason == "model_context_window_exceeded"


@asynchronous
async def test_tool_calls_are_blocks_after_the_text() -> None:
    async with served(says("I look. ", CALL), tool_call_parser="hermes") as server:
        answer = message_of(await server.client.post(PATH, {**BODY, "tools": [TOOL]}))
        text, call = answer.content
        assert (text.type, call.type, answer.stop_reason) == ("text", "tool_use", "tool_use")
        assert call.type == "tool_use" and (call.name, call.input) == ("f", {"a": [1, 2]})
        assert call.id.startswith("toolu_")


@asynchronous
async def test_thinking_is_a_block_before_the_text() -> None:
    async with served(says("<think>plan", "</think>\n", "Paris."), reasoning_parser="qwen3") as server:
        answer = message_of(await server.client.post(PATH, {**BODY, "thinking": {"type": "adaptive"}}))
        thought, text = answer.content
        assert thought.type == "thinking" and (thought.thinking, bool(thought.signature)) == ("plan", True)
        assert text.type == "text" and text.text == "Paris."
        assert answer.usage.output_tokens_details and answer.usage.output_tokens_details.thinking_tokens == 1
        omitted = {**BODY, "thinking": {"type": "adaptive", "display": "omitted"}}
        thought = message_of(await server.client.post(PATH, omitted)).content[0]
        assert thought.type == "thinking" and (thought.thinking, bool(thought.signature)) == ("", True)


@asynchronous
async def test_system_tools_and_thinking_reach_the_template() -> None:
    async with served(says("x")) as server:
        body = {**BODY, "system": "s", "tools": [TOOL], "thinking": {"type": "disabled"}}
        message_of(await server.client.post(PATH, body))
        [generate] = await server.ring.sent_of(Generate)
        assert [message["role"] for message in generate.chat.messages] == ["system", "user"]
        assert generate.chat.template_kwargs["enable_thinking"] is False
        assert [tool["function"]["name"] for tool in generate.chat.tools] == ["f"]


@asynchronous
async def test_fields_of_the_hosted_service_are_ignored() -> None:
    async with served(says("x")) as server:
        more = {
            "metadata": {"user_id": "u"},
            "service_tier": "auto",
            "cache_control": {"type": "ephemeral"},
            "context_management": {"edits": []},
            "container": None,
            "inference_geo": "eu",
        }
        message_of(await server.client.post(PATH + "?beta=true", BODY | more))


# streams


@asynchronous
async def test_the_events_of_a_stream_come_in_order() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {**BODY, "stream": True})
        [generate] = await server.ring.sent_of(Generate)
        rid = generate.request.rid
        server.ring.push(step(rid, [1], "Par", prompt_tokens=20, cached_tokens=16))
        await call.chunk()
        server.ring.push(step(rid, [2], "is.", finish=Finish(reason="stop", matched=2)))
        answer = await call.answer()
        events = events_of(answer)
        assert [event.type for event in events] == [
            "message_start",
            "content_block_start",
            "content_block_delta",
            "content_block_delta",
            "content_block_stop",
            "message_delta",
            "message_stop",
        ]
        first, last = events[0].message, events[-2]
        assert (first.content, first.stop_reason, first.usage.input_tokens) == ([], None, 4)
        assert (last.delta.stop_reason, last.usage.output_tokens) == ("end_turn", 2)
        assert (last.usage.input_tokens, last.usage.cache_read_input_tokens) == (4, 16)
        assert answer.text.split("\n\n")[1] == 'event: ping\ndata: {"type":"ping"}'
        assert "[DONE]" not in answer.text and answer.headers["request-id"]


@pytest.mark.parametrize("cut", [1, 3, 200])
@asynchronous
async def test_thinking_text_and_tool_calls_are_streamed_in_order(cut: int) -> None:
    output = f"<think>plan</think>I look. {CALL}{CALL}"
    pieces = [output[at : at + cut] for at in range(0, len(output), cut)]
    settings: Any = {"reasoning_parser": "qwen3", "tool_call_parser": "hermes"}
    async with served(says(*pieces), **settings) as server:
        events = events_of(await server.client.post(PATH, {**BODY, "tools": [TOOL], "stream": True}))
        starts = [event.content_block.type for event in events if event.type == "content_block_start"]
        assert starts == ["thinking", "text", "tool_use", "tool_use"]
        deltas = [event for event in events if event.type == "content_block_delta"]
        assert "".join(e.delta.thinking for e in deltas if e.delta.type == "thinking_delta") == "plan"
        assert "".join(e.delta.text for e in deltas if e.delta.type == "text_delta").strip() == "I look."
        for index in (2, 3):
            arguments = "".join(e.delta.partial_json for e in deltas if e.index == index)
            assert json.loads(arguments) == {"a": [1, 2]}
        assert events[-2].delta.stop_reason == "tool_use"


@asynchronous
async def test_one_call_is_kept_where_parallel_tool_use_is_disabled() -> None:
    async with served(says(CALL, CALL), tool_call_parser="hermes") as server:
        choice = {"type": "auto", "disable_parallel_tool_use": True}
        answer = message_of(await server.client.post(PATH, {**BODY, "tools": [TOOL], "tool_choice": choice}))
        assert [block.type for block in answer.content] == ["tool_use"]


@asynchronous
async def test_an_error_during_a_stream_is_an_error_event() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {**BODY, "stream": True}, headers={"x-request-id": "mine"})
        [generate] = await server.ring.sent_of(Generate)
        server.ring.push(step(generate.request.rid, [1], "Par", prompt_tokens=3))
        await call.chunk()
        server.ring.push(step(generate.request.rid, finish=Finish(reason="error", status=500, message="it broke")))
        *_, last = (await call.answer()).text.removesuffix("\n\n").split("\n\n")
        name, data = last.split("\n")
        assert name == "event: error"
        assert json.loads(data.removeprefix("data: ")) == {
            "type": "error",
            "error": {"type": "api_error", "message": "it broke"},
            "request_id": "mine",
        }


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_an_aborted_request_is_an_error_after_which_clients_do_not_try_again(stream: bool) -> None:
    async with served(ends(Finish(reason="abort"))) as server:
        answer = await server.client.post(PATH, {**BODY, "stream": stream})
        assert "The request was aborted." in answer.text and "invalid_request_error" in answer.text
        assert stream or answer.status == 400


@asynchronous
async def test_a_request_that_a_shutdown_has_aborted_may_be_tried_again() -> None:
    async with served(ends(Finish(reason="abort"))) as server:
        server.gateway.phase = Phase.DRAINING
        answer = await server.client.post(PATH, BODY)
        assert answer.status == 503 and "overloaded_error" in answer.text and answer.headers["retry-after"]


@asynchronous
async def test_the_id_of_a_message_is_that_of_its_request_so_that_it_can_be_aborted() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {**BODY, "stream": True})
        [sent] = await server.ring.sent_of(Generate)
        server.ring.push(step(sent.request.rid, finish=Finish(reason="length")))
        start, *_ = events_of(await call.answer())
        assert start.message.id == sent.request.rid and start.message.id.startswith("msg_")


# counts


async def counted(body: dict[str, Any]) -> tuple[Any, Answer]:
    """The command that asks the tokenizer, and the answer."""
    async with served() as server:
        server.ring.answers_commands = False
        call = asyncio.create_task(server.client.post(COUNT, body))
        [sent] = await server.ring.sent_of(Tokenize)
        server.ring.push(Reply(id=sent.id, body={"tokens": [pack_ids([1, 2, 3])]}))
        return sent, await call


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"system": [{"type": "text", "text": "s"}]},
        {"tools": [TOOL]},
        {"tools": [TOOL], "tool_choice": {"type": "none"}},
        {"thinking": {"type": "disabled"}},
        {"output_config": {"effort": "low"}},
        {"messages": [*BODY["messages"], {"role": "assistant", "content": "a"}]},
    ],
)
@asynchronous
async def test_count_tokens_counts_the_prompt_of_messages(options: dict[str, Any]) -> None:
    sent, answer = await counted(BODY | options)
    assert MessageTokensCount.model_validate(answer.json()).input_tokens == 3
    async with served(says("x")) as server:
        message_of(await server.client.post(PATH, BODY | options))
        [generate] = await server.ring.sent_of(Generate)
        assert sent.chat == generate.chat
