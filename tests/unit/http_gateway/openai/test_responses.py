"""/v1/responses from the client's side, on a ring that answers in process; in the types of the `openai` package."""

import json
from typing import Any

import pytest
from openai.types import responses as sdk
from pydantic import TypeAdapter

from quartet.http_gateway.openai.response_input import ModelTurn, messages_of
from quartet.runtime.messages import Chat, Finish, Generate
from tests.unit.http_gateway.harness import Served, asynchronous, served, step
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/responses"
WEATHER = {
    "type": "function",
    "name": "weather",
    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
}
OTHER = {"type": "function", "name": "other"}
CALL = ("<tool", '_call>{"name": "weather", "arguments"', ': {"city": "U', 'lm"}}</tool_call>')
SECOND_CALL = '<tool_call>{"name": "other", "arguments": {}}</tool_call>'
ARGUMENTS = '{"city": "Ulm"}'
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(sdk.ResponseStreamEvent)


async def ask(server: Served, **body: Any) -> dict[str, Any]:
    """The answer; it is a response as the `openai` package knows it."""
    answer = await server.client.post(PATH, {"input": "hi", **body})
    assert answer.status == 200, answer.text
    sdk.Response.model_validate_json(answer.text, strict=True)
    found: dict[str, Any] = answer.json()
    return found


async def events_of(server: Served, **body: Any) -> list[dict[str, Any]]:
    """The events of a stream, each one of the `openai` package's, numbered in their order."""
    answer = await server.client.post(PATH, {"input": "hi", "stream": True, **body})
    assert answer.status == 200, answer.text
    lines = [line.removeprefix("data: ") for line in answer.text.split("\n") if line.startswith("data: {")]
    for line in lines:
        STREAM_EVENT.validate_json(line, strict=True)
    events = [json.loads(line) for line in lines]
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    return events


def names_of(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


def chat_of(server: Served) -> Chat:
    generate = server.ring.sent[-1]
    assert isinstance(generate, Generate) and generate.chat is not None
    return generate.chat


# texts and thoughts


@asynchronous
async def test_the_id_of_a_response_is_that_of_its_request_so_that_it_can_be_aborted() -> None:
    async with served(says("x")) as server:
        body = await ask(server)
        assert body["id"] == server.ring.sent[0].request.rid
        assert body["output"][0]["id"] == f"msg_{body['id'].removeprefix('resp_')}"


@asynchronous
async def test_a_response_is_a_turn_in_another_shape() -> None:
    async with served(says("Par", "is.")) as server:
        body = (await server.client.post("/v1/responses", {"input": "hi", "instructions": "be brief"})).json()
        assert body["object"] == "response" and body["status"] == "completed" and body["id"].startswith("resp_")
        [item] = body["output"]
        assert item["content"][0]["text"] == "Paris." and item["role"] == "assistant"
        assert body["usage"]["input_tokens"] == 3 and body["usage"]["output_tokens"] == 2
        assert body["store"] is True
        chat = server.ring.sent[0].chat
        assert [message["role"] for message in chat.messages] == ["system", "user"]


@asynchronous
async def test_input_may_be_a_conversation_in_parts() -> None:
    async with served(says("x")) as server:
        said = [
            {"role": "user", "content": [{"type": "input_text", "text": "a"}]},
            {"type": "message", "role": "assistant", "content": [{"type": "output_text", "text": "b"}]},
            {"role": "user", "content": "c"},
        ]
        await server.client.post("/v1/responses", {"input": said})
        contents = [message["content"] for message in server.ring.sent[0].chat.messages]
        assert contents == [[{"type": "text", "text": "a"}], [{"type": "text", "text": "b"}], "c"]


@asynchronous
async def test_a_streamed_response_opens_grows_and_closes() -> None:
    async with served() as server:
        call = server.client.start("POST", "/v1/responses", {"input": "hi", "stream": True})
        [generate] = await server.ring.sent_of(Generate)
        rid = generate.request.rid
        server.ring.push(step(rid, [1], "Par", prompt_tokens=3))
        await call.chunk()
        server.ring.push(step(rid, [2], "is.", finish=Finish(reason="length", length=2)))
        text = (await call.answer()).text
        events = [json.loads(line.removeprefix("data: ")) for line in text.split("\n") if line.startswith("data: {")]
        assert [event["type"].removeprefix("response.") for event in events] == [
            "created",
            "in_progress",
            "output_item.added",
            "content_part.added",
            "output_text.delta",
            "output_text.delta",
            "output_text.done",
            "content_part.done",
            "output_item.done",
            "incomplete",
        ]
        assert [event["sequence_number"] for event in events] == list(range(10))
        assert events[-1]["response"]["incomplete_details"] == {"reason": "max_output_tokens"}
        assert events[6]["text"] == "Paris." and all(f"event: {event['type']}\n" in text for event in events)


@asynchronous
async def test_a_thought_is_an_item_of_its_own_before_the_message() -> None:
    async with served(says("<think>pl", "an</think>\n", "Par", "is."), reasoning_parser="qwen3") as server:
        thought, item = (await server.client.post("/v1/responses", {"input": "hi"})).json()["output"]
        assert thought["type"] == "reasoning" and thought["summary"] == []
        assert thought["content"] == [{"type": "reasoning_text", "text": "plan"}]
        assert item["content"][0]["text"] == "Paris." and item["id"] != thought["id"]
        events = (await server.client.post("/v1/responses", {"input": "hi", "stream": True})).text.split("\n")
        told = [json.loads(line.removeprefix("data: ")) for line in events if line.startswith("data: {")]
        opening = ["output_item.added", "content_part.added"]
        closing = ["content_part.done", "output_item.done"]
        assert [event["type"].removeprefix("response.") for event in told] == [
            *("created", "in_progress", *opening, "reasoning_text.delta", "reasoning_text.done", *closing),
            *(*opening, "output_text.delta", "output_text.done", *closing, "completed"),
        ]
        assert [event["output_index"] for event in told if "output_index" in event] == [0] * 6 + [1] * 6
        assert [item["type"] for item in told[-1]["response"]["output"]] == ["reasoning", "message"]


@pytest.mark.parametrize(
    ("path", "body"), [(PATH, {"input": "hi"}), ("/v1/completions", {"prompt": "hi"})], ids=["responses", "completions"]
)
@asynchronous
async def test_a_budget_bounds_the_thought_of_responses_and_completions(path: str, body: dict[str, Any]) -> None:
    async with served(says("plan</think>yes"), reasoning_parser="deepseek-r1") as server:
        for name in ("thinking_budget", "max_thinking_tokens"):
            assert (await server.client.post(path, {**body, name: 9})).status == 200
            request = server.ring.sent[-1].request
            assert request.params.thinking_budget == 9 and request.thought.closing == "</think>"
        answer = await server.client.post(path, {**body, "thinking_budget": 9, "max_thinking_tokens": 8})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "max_thinking_tokens")
        assert (await server.client.post(path, body)).status == 200
        assert server.ring.sent[-1].request.params.thinking_budget is None
    async with served(says("x"), reasoning_parser="none") as server:
        answer = await server.client.post(path, {**body, "max_thinking_tokens": 9})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "thinking_budget")


@asynchronous
async def test_a_response_cut_off_inside_the_thought_has_no_message() -> None:
    cut = says("<think>a", " b", finish=Finish(reason="length", length=2))
    async with served(cut, reasoning_parser="qwen3") as server:
        body = (await server.client.post("/v1/responses", {"input": "hi"})).json()
        [item] = body["output"]
        assert (item["type"], item["status"], body["status"]) == ("reasoning", "incomplete", "incomplete")


# functions


@asynchronous
async def test_a_call_is_an_item_behind_the_text_before_it() -> None:
    async with served(says("Well. ", *CALL), tool_call_parser="hermes") as server:
        body = await ask(server, tools=[WEATHER])
        text, call = body["output"]
        assert body["status"] == "completed" and body["tools"] == [WEATHER]
        assert (text["type"], text["content"][0]["text"]) == ("message", "Well.")
        assert (call["type"], call["name"], call["arguments"], call["status"]) == (
            *("function_call", "weather", ARGUMENTS),
            "completed",
        )
        assert call["call_id"].startswith("call_") and call["id"].startswith("fc_")


@asynchronous
async def test_a_template_sees_the_functions_of_a_response() -> None:
    async with served(says("x"), tool_call_parser="hermes") as server:
        await ask(server, tools=[{**WEATHER, "description": "d", "strict": False}])
        function = {"name": "weather", "description": "d", "parameters": WEATHER["parameters"], "strict": False}
        assert chat_of(server).tools == [{"type": "function", "function": function}]


@asynchronous
async def test_the_arguments_of_parallel_calls_are_streamed_one_call_after_the_other() -> None:
    async with served(says(*CALL, SECOND_CALL), tool_call_parser="hermes") as server:
        events = await events_of(server, tools=[WEATHER, OTHER])
        first, second = [event["item"] for event in events if event["type"] == "response.output_item.done"]
        assert (first["name"], first["arguments"]) == ("weather", ARGUMENTS)
        assert (second["name"], second["arguments"]) == ("other", "{}")
        deltas = [event for event in events if event["type"] == "response.function_call_arguments.delta"]
        assert len(deltas) >= 2
        for item in (first, second):
            assert "".join(event["delta"] for event in deltas if event["item_id"] == item["id"]) == item["arguments"]
        arguments = ["function_call_arguments.delta", "function_call_arguments.done"]
        one_call = ["output_item.added", *arguments, "output_item.done"]
        names = names_of(events)
        once = [name for i, name in enumerate(names) if name != arguments[0] or names[i - 1] != name]
        assert once == ["created", "in_progress", *one_call, *one_call, "completed"]
        assert events[-1]["response"]["output"] == [first, second]


@asynchronous
async def test_one_call_at_a_time_where_calls_may_not_be_parallel() -> None:
    async with served(says(*CALL, SECOND_CALL), tool_call_parser="hermes") as server:
        body = await ask(server, tools=[WEATHER, OTHER], parallel_tool_calls=False)
        assert [item["name"] for item in body["output"]] == ["weather"] and body["parallel_tool_calls"] is False


@pytest.mark.parametrize(
    ("choice", "names"),
    [
        ("required", ["weather", "other"]),
        ({"type": "function", "name": "weather"}, ["weather"]),
        ({"type": "allowed_tools", "mode": "required", "tools": [{"type": "function", "name": "other"}]}, ["other"]),
    ],
)
@asynchronous
async def test_a_demanded_call_is_enforced(choice: Any, names: list[str]) -> None:
    async with served(says(f'[{{"name": "{names[0]}", "parameters": {{}}}}]')) as server:
        body = await ask(server, tools=[WEATHER, OTHER], tool_choice=choice)
        assert body["output"][0]["name"] == names[0] and body["tool_choice"] == choice
        kind, text = server.ring.sent[-1].request.params.grammar
        calls = json.loads(text)["items"]["anyOf"]
        assert kind == "json_schema" and [call["properties"]["name"]["const"] for call in calls] == names


@asynchronous
async def test_tools_that_are_not_allowed_are_not_shown_to_the_model() -> None:
    async with served(says("x")) as server:
        tools = [{"type": "function", "name": "other"}]
        await ask(server, tools=[WEATHER, OTHER], tool_choice={"type": "allowed_tools", "mode": "auto", "tools": tools})
        assert [tool["function"]["name"] for tool in chat_of(server).tools or ()] == ["other"]


@asynchronous
async def test_a_call_that_is_cut_off_is_incomplete() -> None:
    cut = says(*CALL[:3], finish=Finish(reason="length", length=3))
    async with served(cut, tool_call_parser="hermes") as server:
        body = await ask(server, tools=[WEATHER])
        [call] = body["output"]
        assert (body["status"], call["status"], call["type"]) == ("incomplete", "incomplete", "function_call")


@asynchronous
async def test_a_call_that_a_stop_string_breaks_off_is_incomplete() -> None:
    cut = says(*CALL[:3], finish=Finish(reason="stop", length=3, matched="lm"))
    async with served(cut, tool_call_parser="hermes") as server:
        whole = await ask(server, tools=[WEATHER])
        events = await events_of(server, tools=[WEATHER])
        assert (names_of(events)[-1], events[-2]["item"]["status"]) == ("incomplete", "incomplete")
        for body in (whole, events[-1]["response"]):
            [call] = body["output"]
            assert (body["status"], call["status"], call["type"]) == ("incomplete", "incomplete", "function_call")
            assert body["incomplete_details"] == {"reason": "max_output_tokens"} and not body["completed_at"]


@asynchronous
async def test_a_call_that_was_dropped_cannot_be_broken_off() -> None:
    cut = says(*CALL, SECOND_CALL[:-14], finish=Finish(reason="stop", length=5, matched="}}"))
    async with served(cut, tool_call_parser="hermes") as server:
        body = await ask(server, tools=[WEATHER, OTHER], parallel_tool_calls=False)
        assert (body["status"], [item["status"] for item in body["output"]]) == ("completed", ["completed"])


@asynchronous
async def test_the_items_of_one_turn_become_one_message() -> None:
    async with served(says("x")) as server:
        items = [
            {"role": "user", "content": "weather?"},
            {"type": "reasoning", "id": "rs", "summary": [], "content": [{"type": "reasoning_text", "text": "plan"}]},
            {"type": "message", "role": "assistant", "content": "Well."},
            {"type": "function_call", "call_id": "a", "name": "weather", "arguments": ARGUMENTS},
            {"type": "function_call", "call_id": "b", "name": "other", "arguments": "{}"},
            {"type": "function_call_output", "call_id": "a", "output": "sunny"},
            {"type": "function_call_output", "call_id": "b", "output": [{"type": "input_text", "text": "done"}]},
            {"type": "reasoning", "id": "rs2", "summary": [{"type": "summary_text", "text": "short"}]},
            {"role": "assistant", "content": "It is sunny."},
        ]
        await ask(server, input=items)
        calls = [("a", "weather", ARGUMENTS), ("b", "other", "{}")]
        assert chat_of(server).messages == [
            {"role": "user", "content": "weather?"},
            {
                "role": "assistant",
                "content": "Well.",
                "reasoning_content": "plan",
                "tool_calls": [
                    {"id": id, "type": "function", "function": {"name": name, "arguments": arguments}}
                    for id, name, arguments in calls
                ],
            },
            {"role": "tool", "tool_call_id": "a", "content": "sunny"},
            {"role": "tool", "tool_call_id": "b", "content": "done"},
            {"role": "assistant", "content": "It is sunny.", "reasoning_content": "short"},
        ]


@asynchronous
async def test_texts_around_a_call_are_one_turn_and_other_turns_are_not() -> None:
    async with served(says("x")) as server:
        items = [
            {"role": "assistant", "content": "a"},
            {"role": "assistant", "content": "b"},
            {"type": "function_call", "call_id": "1", "name": "other", "arguments": "{}"},
            {"role": "assistant", "content": [{"type": "output_text", "text": "c"}]},
            {"type": "reasoning", "summary": [], "encrypted_content": "?"},
            {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "plan"}]},
        ]
        await ask(server, input=items)
        first, second, third = chat_of(server).messages
        assert first == {"role": "assistant", "content": "a"}
        assert second["content"] == [{"type": "text", "text": "b"}, {"type": "text", "text": "c"}]
        assert len(second["tool_calls"]) == 1
        assert third == {"role": "assistant", "content": "", "reasoning_content": "plan"}


@pytest.mark.parametrize(
    "item",
    [
        {"role": "assistant", "content": "abcd"},
        {"role": "assistant", "content": [{"type": "output_text", "text": "a"}] * 2},
        {"type": "reasoning", "content": [{"type": "reasoning_text", "text": "abcd"}]},
        {"type": "function_call", "call_id": "1", "name": "other", "arguments": "{}"},
    ],
)
def test_a_turn_of_many_items_is_joined_once(item: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    message = ModelTurn.message
    monkeypatch.setattr(ModelTurn, "message", lambda turn: joined.append(turn) or message(turn))
    call = {"type": "function_call", "call_id": "0", "name": "other", "arguments": "{}"}
    first = [] if item.get("type") == "reasoning" else [call]
    assert len(messages_of(first + [item] * 500)) == len(joined) == 1


@asynchronous
async def test_what_costs_nothing_may_be_included() -> None:
    async with served(says("x")) as server:
        body = await ask(
            server,
            include=["reasoning.encrypted_content", "web_search_call.results"],
            reasoning={"effort": "low", "summary": "auto"},
            max_tool_calls=3,
            truncation="auto",
            metadata={"a": "b"},
        )
        assert body["reasoning"] == {"effort": "low", "summary": "auto"} and body["max_tool_calls"] == 3
        assert body["truncation"] == "auto" and body["metadata"] == {"a": "b"}
        assert chat_of(server).template_kwargs == {"reasoning_effort": "low"}
        assert server.ring.sent[-1].request.truncate


@asynchronous
async def test_the_form_of_the_output_is_answered_as_it_was_given() -> None:
    form = {"type": "json_schema", "name": "n", "strict": True, "schema": {"type": "object"}}
    async with served(says("{}")) as server:
        assert (await ask(server, text={"format": form}))["text"] == {"format": form}


# refusals


FUNCTION_OUTPUT = {"type": "function_call_output", "call_id": "a", "output": "x"}
FUNCTION_CALL = {"type": "function_call", "call_id": "a", "name": "n", "arguments": "{}"}


@asynchronous
async def test_a_demanded_call_has_the_form_of_its_arguments_not_of_a_message() -> None:
    schema = {"type": "json_schema", "name": "a", "schema": {"type": "object"}}
    async with served(says("[]"), tool_call_parser="hermes") as server:
        for choice in ("required", {"type": "function", "name": "weather"}):
            body = await ask(server, tools=[WEATHER], tool_choice=choice, text={"format": schema})
            assert body["text"]["format"]["type"] == "json_schema"
            params = server.ring.sent[-1].request.params
            assert params.call_grammar is not None and "weather" in params.call_grammar and not params.json_schema


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        *(
            ({"tools": [{"type": kind}]}, "tools", kind)
            for kind in ("web_search", "file_search", "code_interpreter", "mcp")
        ),
        ({"tools": [{"type": "function"}]}, "tools", "name"),
        ({"tools": [WEATHER, WEATHER]}, "tools", "2 tools have the name 'weather'"),
        (
            {
                "tools": [WEATHER, WEATHER],
                "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "weather"}]},
            },
            "tools",
            "2 tools have the name 'weather'",
        ),
        ({"tools": [WEATHER], "tool_choice": {"type": "mcp"}}, "tool_choice", "hosted tools"),
        ({"tools": [WEATHER], "tool_choice": {"type": "function", "name": "no"}}, "tool_choice", "no"),
        ({"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto"}}, "tool_choice", "tools"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": []}]}},
            "tool_choice",
            "[]",
        ),
        ({"include": ["message.output_text.logprobs"]}, "include", "message.output_text.logprobs"),
        ({"max_tool_calls": 0}, "max_tool_calls", "at least 1"),
        ({"background": True, "store": False}, "store", "background"),
        ({"conversation": "c"}, "conversation", "conversation"),
        ({"top_logprobs": 2}, "top_logprobs", "top_logprobs"),
        ({"prompt": {"id": "p"}}, "prompt.id", "prompt"),
        ({"input": [FUNCTION_OUTPUT]}, "input", "input[0]: no function_call with call_id 'a'"),
        ({"input": [{**FUNCTION_CALL, "arguments": {}}]}, "input", "input[0]: arguments"),
        ({"input": [FUNCTION_CALL, {**FUNCTION_OUTPUT, "output": 1}]}, "input", "input[1]: output"),
        ({"input": [{"type": "computer_call"}]}, "input", "computer_call"),
        ({"input": [{"type": ["x"]}]}, "input", "input[0]"),
        ({"input": [{"type": "reasoning", "summary": [1]}]}, "input", "summary"),
        ({"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input", "text"),
    ],
)
@asynchronous
async def test_what_a_response_cannot_do_is_refused(body: dict[str, Any], param: str, words: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"input": "a", **body})
        error = answer.json()["error"]
        assert (answer.status, error["param"]) == (400, param) and words in error["message"], error


@asynchronous
async def test_a_stream_that_fails_ends_with_a_failed_response() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {"input": "hi", "stream": True})
        [generate] = await server.ring.sent_of(Generate)
        server.ring.push(step(generate.request.rid, [1], "Par", prompt_tokens=3))
        await call.chunk()
        server.ring.push(step(generate.request.rid, finish=Finish(reason="error", message="no memory", status=500)))
        lines = [line for line in (await call.answer()).text.split("\n") if line.startswith("data: ")]
        last = STREAM_EVENT.validate_json(lines[-1].removeprefix("data: "))
        assert (last.type, last.sequence_number, last.response.error.message) == ("response.failed", 5, "no memory")
        assert (last.response.status, last.response.store) == ("failed", False)


@asynchronous
async def test_a_response_that_was_aborted_has_failed() -> None:
    async with served(says("Par", finish=Finish(reason="abort", message="x"))) as server:
        body = await ask(server)
        assert (body["status"], body["error"]["code"]) == ("failed", "server_error")
        assert body["output"][0]["status"] == "incomplete"
        assert names_of(await events_of(server))[-1] == "failed"


# tools of coding agents

NAMESPACE = {
    "type": "namespace",
    "name": "agents",
    "description": "Tools for other agents.",
    "tools": [{"type": "function", "name": "close", "parameters": {"type": "object", "properties": {}}}],
}
SEARCH = {"type": "web_search", "external_web_access": False}
CLOSE_CALL = '<tool_call>{"name": "agents__close", "arguments": {}}</tool_call>'


@asynchronous
async def test_the_functions_of_a_namespace_are_called_by_their_own_names() -> None:
    async with served(says(CLOSE_CALL), tool_call_parser="hermes") as server:
        body = await ask(server, tools=[WEATHER, NAMESPACE])
        assert [tool["function"]["name"] for tool in chat_of(server).tools or ()] == ["weather", "agents__close"]
        [call] = body["output"]
        assert (call["type"], call["namespace"], call["name"]) == ("function_call", "agents", "close")
        assert body["tools"][1]["type"] == "namespace"
        back = [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "closed"}]
        await ask(server, input=[{"role": "user", "content": "hi"}, *back], tools=[NAMESPACE])
        [sent] = chat_of(server).messages[1]["tool_calls"]
        assert sent["function"]["name"] == "agents__close"


@asynchronous
async def test_a_streamed_call_of_a_namespace_has_its_own_name_in_every_event() -> None:
    async with served(says(CLOSE_CALL), tool_call_parser="hermes") as server:
        events = await events_of(server, tools=[NAMESPACE])
        added, done = (event["item"] for event in events if event["type"].startswith("response.output_item."))
        assert [(item["namespace"], item["name"]) for item in (added, done)] == [("agents", "close")] * 2
        [arguments] = [event for event in events if event["type"] == "response.function_call_arguments.done"]
        assert arguments["name"] == "close"


@pytest.mark.parametrize("choice", [{"type": "function", "namespace": "agents", "name": "close"}, "required"])
@asynchronous
async def test_a_function_of_a_namespace_can_be_demanded(choice: Any) -> None:
    async with served(says(CLOSE_CALL), tool_call_parser="hermes") as server:
        await ask(server, tools=[NAMESPACE], tool_choice=choice)
        assert "agents__close" in str(server.ring.sent[-1].request.params)


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_hosted_tools_beside_functions_can_be_left_out_and_the_answer_says_so(stream: bool) -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        answer = await server.client.post(PATH, {"input": "hi", "tools": [WEATHER, SEARCH], "stream": stream})
        assert answer.status == 200, answer.text
        assert "tools[1] (web_search)" in answer.headers["warning"]
        assert [tool["function"]["name"] for tool in chat_of(server).tools or ()] == ["weather"]
        assert '"name":"weather"' in answer.text and '"web_search"' not in answer.text
        plain = await server.client.post(PATH, {"input": "hi", "tools": [WEATHER]})
        assert "warning" not in plain.headers


@asynchronous
async def test_the_stream_of_a_background_response_says_what_was_left_out() -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        body = {"input": "hi", "tools": [WEATHER, SEARCH], "background": True, "stream": True}
        answer = await server.client.post(PATH, body)
        assert answer.status == 200 and "tools[1] (web_search)" in answer.headers["warning"]


@asynchronous
async def test_the_warning_is_short_however_many_tools_are_left_out() -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        answer = await server.client.post(PATH, {"input": "hi", "tools": [WEATHER, *[SEARCH] * 1000]})
        warning = answer.headers["warning"]
        assert answer.status == 200 and len(warning) < 300
        assert "tools[1] (web_search)" in warning and "and 992 more" in warning


@pytest.mark.parametrize("namespaces", [[], [{"type": "namespace", "name": "n", "tools": []}]])
@asynchronous
async def test_hosted_tools_are_left_out_beside_functions_only(namespaces: list[dict[str, Any]]) -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        answer = await server.client.post(PATH, {"input": "hi", "tools": [*namespaces, SEARCH]})
        assert answer.status == 400 and "'web_search' are not supported" in answer.text


@pytest.mark.parametrize("parser", ["hermes", "qwen3_coder"])
@asynchronous
async def test_calls_are_read_whatever_is_in_the_name_of_their_namespace(parser: str) -> None:
    """The second format would take a slash for the end of a name."""
    calls = {
        "hermes": '<tool_call>{"name": "a_b_c__close", "arguments": {}}</tool_call>',
        "qwen3_coder": "<tool_call>\n<function=a_b_c__close>\n</function>\n</tool_call>",
    }
    namespace = {**NAMESPACE, "name": "a/b c"}
    async with served(says(calls[parser]), tool_call_parser=parser) as server:
        [call] = (await ask(server, tools=[namespace]))["output"]
        assert (call["namespace"], call["name"]) == ("a/b c", "close")
        back = [call, {"type": "function_call_output", "call_id": call["call_id"], "output": "closed"}]
        choice = {"type": "function", "namespace": "a/b c", "name": "close"}
        await ask(server, input=[{"role": "user", "content": "hi"}, *back], tools=[namespace], tool_choice=choice)
        assert chat_of(server).messages[1]["tool_calls"][0]["function"]["name"] == "a_b_c__close"
        assert [tool["function"]["name"] for tool in chat_of(server).tools or ()] == ["a_b_c__close"]
        assert "a_b_c__close" in str(server.ring.sent[-1].request.params)


@asynchronous
async def test_two_functions_with_one_name_for_the_model_are_refused() -> None:
    plain = {"type": "function", "name": "agents__close"}
    for other in (plain, {**NAMESPACE, "name": "agents_"}, {**NAMESPACE, "name": "agents/"}):
        async with served(says("x")) as server:
            answer = await server.client.post(PATH, {"input": "hi", "tools": [NAMESPACE, other]})
            assert answer.status == 400 and "2 tools have the name 'agents__close'" in answer.text


@asynchronous
async def test_a_name_that_each_function_gets_is_short() -> None:
    functions = [{"type": "function", "name": f"f{index}"} for index in range(3)]
    async with served(says("x")) as server:
        for chars, status in ((128, 200), (129, 400)):
            tools = [{"type": "namespace", "name": "n" * chars, "tools": functions}]
            answer = await server.client.post(PATH, {"input": "hi", "tools": tools})
            assert answer.status == status
        assert answer.json()["error"]["message"].endswith("128 characters at most, got 129.")


@asynchronous
async def test_a_hosted_tool_among_those_that_are_allowed_is_named() -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        choice = {"type": "allowed_tools", "mode": "auto", "tools": [{"type": "web_search"}]}
        answer = await server.client.post(PATH, {"input": "hi", "tools": [WEATHER, SEARCH], "tool_choice": choice})
        assert answer.status == 400 and "tool 'web_search' not found" in answer.text


@asynchronous
async def test_a_refused_minimum_is_called_as_the_client_has_called_it() -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"input": "hi", "min_tokens": -1})
        error = answer.json()["error"]
        assert (answer.status, error["param"]) == (400, "min_tokens") and error["message"].startswith("min_tokens")
        answer = await server.client.post(PATH, {"input": "hi", "min_new_tokens": 2})
        assert answer.status == 400 and "use `min_tokens`" in answer.text


@pytest.mark.parametrize(
    ("tools", "words"),
    [
        ([SEARCH], "'web_search' are not supported"),
        ([WEATHER, SEARCH], "tools[1]: tools of type 'web_search'"),
        ([WEATHER, {"type": "mcp", "server_label": "x"}], "tools[1]: tools of type 'mcp'"),
        ([WEATHER, {"type": "custom", "name": "x"}], "tools[1]: tools of type 'custom'"),
        ([{"type": "namespace", "name": "n", "tools": [SEARCH]}], "tools[0].tools[0]: tools of type 'web_search'"),
        ([{"type": "namespace", "tools": []}], "a namespace needs a name"),
        ([{"type": "namespace", "name": "n", "tools": {}}], "tools must be a list"),
        ([NAMESPACE, NAMESPACE], "2 tools have the name 'agents__close'"),
    ],
)
@asynchronous
async def test_tools_that_nobody_could_run_are_refused_by_name(tools: list[dict[str, Any]], words: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"input": "hi", "tools": tools})
        assert (answer.status, answer.json()["error"]["param"]) == (400, "tools") and words in answer.text


@asynchronous
async def test_a_hosted_tool_that_was_left_out_cannot_be_demanded() -> None:
    async with served(says("x"), leave_out_hosted_tools=True) as server:
        body = {"input": "hi", "tools": [WEATHER, SEARCH], "tool_choice": {"type": "web_search"}}
        answer = await server.client.post(PATH, body)
        assert answer.status == 400 and "hosted tools are not supported" in answer.text
