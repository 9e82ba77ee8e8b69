"""The smaller endpoints around the OpenAI API: tokenize and detokenize, parsers of text made elsewhere."""

import asyncio
import json
from typing import Any

import pytest

from quartet.runtime.control import Detokenize, Tokenize
from quartet.runtime.limits import MAX_PARSED_BODY_BYTES
from quartet.runtime.messages import Generate, Reply, pack_ids, unpack_ids
from tests.unit.http_gateway.harness import asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

# tokens


async def command(path: str, body: Any, kind: type, reply: dict[str, Any], **failed: Any) -> tuple[Any, Any]:
    """The command that a body sends round the ring, and the answer once the ring replies."""
    async with served() as server:
        server.ring.answers_commands = False
        call = asyncio.create_task(server.client.post(path, body))
        [sent] = await server.ring.sent_of(kind)
        server.ring.push(Reply(id=sent.id, body=reply, **failed))
        return sent, await call


@pytest.mark.parametrize("path", ["/tokenize", "/v1/tokenize"])
@asynchronous
async def test_tokenize_one_text_and_many(path: str) -> None:
    sent, answer = await command(path, {"prompt": "a"}, Tokenize, {"tokens": [pack_ids([1, 2])]})
    assert sent.texts == ["a"] and sent.add_special_tokens
    assert answer.json() == {"tokens": [1, 2], "count": 2, "max_model_len": 512}
    sent, answer = await command(
        path,
        {"prompt": ["a", "b"], "add_special_tokens": False},
        Tokenize,
        {"tokens": [pack_ids([1, 2]), pack_ids([3])]},
    )
    assert sent.texts == ["a", "b"] and not sent.add_special_tokens
    assert answer.json() == {"tokens": [[1, 2], [3]], "count": [2, 1], "max_model_len": 512}


@asynchronous
async def test_tokenize_a_conversation() -> None:
    body = {"messages": [{"role": "user", "content": "a"}], "chat_template_kwargs": {"x": 1}}
    sent, answer = await command("/tokenize", body, Tokenize, {"tokens": [pack_ids([1])]})
    assert sent.chat.messages == body["messages"] and sent.chat.template_kwargs == {"x": 1}
    assert answer.json()["count"] == 1


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "none"},
        {"tools": [{"type": "function", "function": {"name": "f"}}], "tool_choice": "required"},
        {"messages": [{"role": "developer", "content": "b"}, {"role": "user", "content": "a"}]},
        {"reasoning_effort": "none"},
        {"reasoning_effort": "high", "chat_template_kwargs": {"x": 1}},
        {"messages": [{"role": "assistant", "content": "a"}], "continue_final_message": True},
        {"documents": [{"title": "t", "text": "x"}]},
        {"add_generation_prompt": False},
        {"max_tokens": 3, "temperature": 0.5},
    ],
)
@asynchronous
async def test_tokenize_renders_what_a_chat_completion_renders(options: dict[str, Any]) -> None:
    body = {"messages": [{"role": "user", "content": "a"}], **options}
    sent, _ = await command("/tokenize", body, Tokenize, {"tokens": [pack_ids([1])]})
    async with served(says("x")) as server:
        assert (await server.client.post("/v1/chat/completions", body)).status == 200
        [generate] = await server.ring.sent_of(Generate)
        assert sent.chat == generate.chat


@asynchronous
async def test_tokenize_of_ids_is_those_ids() -> None:
    async with served() as server:
        answer = await server.client.post("/tokenize", {"messages": [], "input_ids": [5, 6]})
        assert answer.json()["tokens"] == [5, 6]


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@pytest.mark.parametrize("where", [{"chat_template": "x"}, {"chat_template_kwargs": {"chat_template": "x"}}])
@asynchronous
async def test_a_template_of_the_client_is_refused(path: str, where: dict[str, Any]) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(path, {"messages": [{"role": "user", "content": "a"}], **where})
        assert (answer.status, answer.json()["param"]) == (400, "chat_template")


@pytest.mark.parametrize("path", ["/tokenize", "/v1/chat/completions"])
@asynchronous
async def test_a_user_says_something(path: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(path, {"messages": [{"role": "user", "content": None}]})
        assert (answer.status, answer.json()["param"]) == (400, "messages")


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/score", {"query": "a", "items": ["b"], "label_token_ids": [10**6]}, "label_token_ids"),
        ("/v1/score", {"query": [1], "items": [[10**6]], "label_token_ids": [1]}, "items"),
        ("/v1/completions", {"prompt": "a", "min_tokens": -1}, "min_tokens"),
        ("/v1/completions", {"prompt": "a", "seed": 2**70}, "seed"),
        ("/v1/completions", {"prompt": [10**6]}, "prompt"),
        ("/v1/completions", {"prompt": "a", "logprobs": 1000}, "logprobs"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}], "seed": 2**70}, "seed"),
        (
            "/v1/chat/completions",
            {"messages": [{"role": "user", "content": "a"}], "logprobs": True, "top_logprobs": 1000},
            "top_logprobs",
        ),
        ("/v1/responses", {"input": "a", "max_output_tokens": 10**6}, "max_output_tokens"),
        ("/v1/responses", {"input": []}, "input"),
    ],
)
@asynchronous
async def test_an_error_blames_a_field_that_was_sent(path: str, body: dict[str, Any], param: str) -> None:
    async with served(says("x")) as server:
        said = (await server.client.post(path, body)).json()
        assert (said["code"], said["param"]) == (400, param), said
        assert param in said["message"] or param == "input", said


@asynchronous
async def test_detokenize_one_list_and_many() -> None:
    sent, answer = await command("/detokenize", {"tokens": [1, 2]}, Detokenize, {"texts": ["ab"]})
    assert unpack_ids(sent.ids[0]).tolist() == [1, 2] and sent.skip_special_tokens
    assert answer.json() == {"text": "ab"}
    body = {"tokens": [[1], [2]], "skip_special_tokens": False}
    sent, answer = await command("/v1/detokenize", body, Detokenize, {"texts": ["a", "b"]})
    assert not sent.skip_special_tokens and answer.json() == {"text": ["a", "b"]}


@asynchronous
async def test_what_a_service_refuses_is_the_client_s_answer() -> None:
    refused = {"success": False, "message": "no tokenizer", "status": 400}
    _, answer = await command("/tokenize", {"prompt": "a"}, Tokenize, {}, **refused)
    assert (answer.status, answer.json()["message"]) == (400, "no tokenizer")


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": "a", "messages": []}),
        ("/tokenize", {"prompt": ["a"] * 1025}),
        ("/detokenize", {"tokens": [1, [2]]}),
        ("/detokenize", {"tokens": [1 << 40]}),
    ],
)
@asynchronous
async def test_bodies_that_make_no_sense(path: str, body: dict[str, Any]) -> None:
    async with served() as server:
        assert (await server.client.post(path, body)).status == 400


# parsers


@asynchronous
async def test_parse_function_call() -> None:
    text = 'Sure. <tool_call>{"name": "f", "arguments": {"a": 1}}</tool_call>'
    body = {"text": text, "tools": [{"type": "function", "function": {"name": "f"}}], "tool_call_parser": "qwen25"}
    async with served() as server:
        answer = await server.client.post("/parse_function_call", body)
        assert answer.json()["normal_text"] == "Sure."
        [call] = answer.json()["calls"]
        assert (call["tool_index"], call["name"], json.loads(call["parameters"])) == (0, "f", {"a": 1})


@asynchronous
async def test_separate_reasoning() -> None:
    async with served() as server:
        body = {"text": "<think>a</think>b", "reasoning_parser": "qwen3"}
        assert (await server.client.post("/separate_reasoning", body)).json() == {"reasoning_text": "a", "text": "b"}


@asynchronous
async def test_parsers_are_the_server_s_own_unless_named_and_must_exist() -> None:
    async with served(reasoning_parser="deepseek-r1") as server:
        answer = await server.client.post("/separate_reasoning", {"text": "a</think>b"})
        assert answer.json() == {"reasoning_text": "a", "text": "b"}
        long = await server.client.post("/parse_function_call", {"text": "a" * MAX_PARSED_BODY_BYTES, "tools": []})
        assert (long.status, str(MAX_PARSED_BODY_BYTES) in long.text) == (413, True)
        answer = await server.client.post("/parse_function_call", {"text": "a", "tools": []})
        assert answer.status == 400 and "Unsupported tool call parser" in answer.json()["error"]["message"]
