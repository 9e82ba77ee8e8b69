"""The `anthropic` package, unchanged, against real servers."""

import asyncio
import json
from collections.abc import Callable
from typing import Any

import anthropic
import pytest
from anthropic.types import Message
from pydantic import BaseModel

from tests.servers import Server

WAIT_S = 60
QUESTION: Any = [{"role": "user", "content": "What is the capital of France?"}]
ANSWER = "The capital of France is Paris."
GREEDY = {"temperature": 0}  # which later versions of the client have no argument for
CACHED: Any = {"cache_control": {"type": "ephemeral"}}
TOOLS: Any = [
    {
        "name": "weather",
        "description": "Tells the weather.",
        "input_schema": {
            "type": "object",
            "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
    {"name": "stop", "input_schema": {"type": "object", "additionalProperties": False}},
]
KEY = "secret"


def client_of(server: Server, **options: Any) -> anthropic.Anthropic:
    return anthropic.Anthropic(base_url=server.url, max_retries=0, timeout=WAIT_S, **({"api_key": KEY} | options))


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3", "--api-key", KEY)


@pytest.fixture(scope="module")
def client(server: Server) -> anthropic.Anthropic:
    return client_of(server)


def ask(client: anthropic.Anthropic, messages: Any = QUESTION, *, max_tokens: int = 30, **more: Any) -> Message:
    return client.messages.create(model="demo", messages=messages, max_tokens=max_tokens, extra_body=GREEDY, **more)


def test_a_question_is_answered(client: anthropic.Anthropic) -> None:
    answer = ask(client)
    [block] = answer.content
    assert block.type == "text" and block.text == ANSWER
    assert (answer.role, answer.model) == ("assistant", "demo")
    assert (answer.stop_reason, answer.stop_sequence) == ("end_turn", None)
    assert answer._request_id is not None and answer._request_id.startswith("req_")


def test_a_stream_adds_up_to_the_same_message(client: anthropic.Anthropic) -> None:
    with client.messages.stream(model="demo", messages=QUESTION, max_tokens=30, extra_body=GREEDY) as stream:
        kinds = [event.type for event in stream]
        message = stream.get_final_message()
        assert stream.request_id
    assert kinds[:2] == ["message_start", "content_block_start"]
    assert kinds[-3:] == ["content_block_stop", "message_delta", "message_stop"]
    assert kinds.count("text") > 3
    whole = ask(client)
    assert [block.to_dict() for block in message.content] == [block.to_dict() for block in whole.content]
    assert (message.stop_reason, message.usage.output_tokens) == (whole.stop_reason, whole.usage.output_tokens)


def test_stop_reasons(client: anthropic.Anthropic) -> None:
    stopped = ask(client, stop_sequences=["!", " is"])
    [block] = stopped.content
    assert block.type == "text" and block.text == "The capital of France"
    assert (stopped.stop_reason, stopped.stop_sequence) == ("stop_sequence", " is")
    assert ask(client, max_tokens=2).stop_reason == "max_tokens"


def test_a_final_assistant_message_is_continued(client: anthropic.Anthropic) -> None:
    [block] = ask(client, [*QUESTION, {"role": "assistant", "content": "The capital of"}]).content
    assert block.type == "text" and block.text == ANSWER.removeprefix("The capital of")


def test_cached_tokens_are_counted_apart(client: anthropic.Anthropic) -> None:
    long: Any = [{"role": "user", "content": [{"type": "text", "text": "once upon a time " * 30, **CACHED}]}]
    first, second = (ask(client, long, max_tokens=1, system=[{"type": "text", "text": "Hi.", **CACHED}]) for _ in "ab")
    assert second.usage.cache_read_input_tokens and second.usage.cache_read_input_tokens > 30
    assert first.usage.cache_creation_input_tokens == second.usage.cache_creation_input_tokens == 0
    totals = [answer.usage.input_tokens + (answer.usage.cache_read_input_tokens or 0) for answer in (first, second)]
    assert totals[0] == totals[1]


# tools


@pytest.mark.parametrize(
    "choice", [{"type": "any", "disable_parallel_tool_use": True}, {"type": "tool", "name": "weather"}]
)
def test_forced_tool_calls_fit_their_schema(client: anthropic.Anthropic, choice: Any) -> None:
    answer = ask(client, tools=TOOLS, tool_choice=choice, max_tokens=200)
    [call] = answer.content
    assert call.type == "tool_use" and answer.stop_reason == "tool_use"
    assert call.name in ("weather", "stop")
    if call.name == "weather":
        assert call.input.keys() == {"city", "days"}


def test_streamed_arguments_add_up_to_the_whole_input(client: anthropic.Anthropic) -> None:
    asked: Any = {"tools": TOOLS, "tool_choice": {"type": "tool", "name": "weather"}, "max_tokens": 200}
    [whole] = ask(client, **asked).content
    with client.messages.stream(model="demo", messages=QUESTION, extra_body=GREEDY, **asked) as stream:
        pieces = [event.partial_json for event in stream if event.type == "input_json"]
        message = stream.get_final_message()
    [joined] = message.content
    assert joined.type == whole.type == "tool_use" and joined.input == whole.input == json.loads("".join(pieces))
    assert message.stop_reason == "tool_use"


def test_tools_that_are_not_forced(client: anthropic.Anthropic) -> None:
    choices: list[Any] = [{"type": "auto"}, {"type": "none"}]
    for choice in choices:
        assert ask(client, tools=TOOLS, tool_choice=choice).content[0].type == "text"


def test_a_tool_result_is_sent_back(client: anthropic.Anthropic) -> None:
    answer = ask(client, tools=TOOLS, tool_choice={"type": "tool", "name": "weather"}, max_tokens=200)
    [call] = answer.content
    assert call.type == "tool_use"
    results: Any = [
        {
            "type": "tool_result",
            "tool_use_id": call.id,
            "content": [{"type": "text", "text": "rain"}],
            "is_error": True,
        },
        {"type": "text", "text": "What is the capital of France?"},
    ]
    turns: Any = [*QUESTION, {"role": "assistant", "content": answer.content}, {"role": "user", "content": results}]
    assert ask(client, turns, tools=TOOLS).content[0].type == "text"


@pytest.mark.parametrize("stream", [False, True])
def test_a_tool_runner_sends_the_whole_conversation(client: anthropic.Anthropic, stream: bool) -> None:
    """It asks for a thread first, in which its next turns would have the new messages only."""
    sunny: list[bool] = []

    @anthropic.beta_tool
    def note(is_sunny: bool) -> str:
        """Notes the weather."""
        sunny.append(is_sunny)
        return "noted"

    runner: Any = client.beta.messages.tool_runner(
        model="demo",
        messages=QUESTION,
        max_tokens=200,
        tools=[note],
        tool_choice={"type": "any", "disable_parallel_tool_use": True},
        max_iterations=2,
        stream=stream,
        extra_body=GREEDY,
    )
    turns = [turn.get_final_message() if stream else turn for turn in runner]
    assert [turn.stop_reason for turn in turns] == ["tool_use", "tool_use"] and len(sunny) == 2
    first, second = (turn.usage.input_tokens + turn.usage.cache_read_input_tokens for turn in turns)
    assert second > first  # the question, the call and its result


# thinking and structure


def test_thinking_blocks_are_streamed_and_accepted_back(client: anthropic.Anthropic) -> None:
    """The demo model does not think by itself: the tag is part of the prompt."""
    begun: Any = [*QUESTION, {"role": "assistant", "content": "<think>The capital of"}]
    for thinking, visible in (
        ({"type": "enabled", "budget_tokens": 20}, True),
        ({"type": "adaptive", "display": "omitted"}, False),
    ):
        asked: Any = {"messages": begun, "max_tokens": 30, "thinking": thinking}
        answer = ask(client, **asked)
        [block] = answer.content
        assert block.type == "thinking" and block.signature and bool(block.thinking) is visible
        assert answer.usage.output_tokens_details and answer.usage.output_tokens_details.thinking_tokens > 0
        with client.messages.stream(model="demo", extra_body=GREEDY, **asked) as stream:
            [streamed] = stream.get_final_message().content
        assert streamed.type == "thinking" and streamed.signature and streamed.thinking == block.thinking
        back: Any = [
            *QUESTION,
            {"role": "assistant", "content": [block, {"type": "text", "text": "Paris."}]},
            *QUESTION,
        ]
        assert ask(client, back, thinking={"type": "disabled"}).content[0].type == "text"


class Capital(BaseModel):
    country: str
    certain: bool


def test_structured_output_is_parsed_by_the_client(client: anthropic.Anthropic) -> None:
    answer = client.messages.parse(
        model="demo", messages=QUESTION, max_tokens=400, output_format=Capital, extra_body=GREEDY
    )
    assert isinstance(answer.parsed_output, Capital)


# other endpoints


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"system": "Be brief."},
        {"tools": TOOLS},
        {"thinking": {"type": "disabled"}},
        {"messages": [*QUESTION, {"role": "assistant", "content": "The"}]},
    ],
)
def test_count_tokens_equals_the_usage_of_messages(client: anthropic.Anthropic, more: Any) -> None:
    asked = {"messages": QUESTION} | more
    used = ask(client, **asked, max_tokens=1).usage
    counted = client.messages.count_tokens(model="demo", **asked).input_tokens
    assert counted == used.input_tokens + (used.cache_read_input_tokens or 0) > 0


def test_models(client: anthropic.Anthropic) -> None:
    assert [model.id for model in client.models.list()] == ["demo"]
    model = client.models.retrieve("demo")
    assert (model.id, model.type, model.max_tokens) == ("demo", "model", 2048)
    with pytest.raises(anthropic.NotFoundError) as error:
        client.models.retrieve("other/model")
    assert error.value.type == "not_found_error"


def test_the_beta_client_and_the_async_client(server: Server, client: anthropic.Anthropic) -> None:
    [block] = client.beta.messages.create(
        model="demo", messages=QUESTION, max_tokens=30, extra_body=GREEDY, betas=["context-management-2025-06-27"]
    ).content
    assert block.type == "text" and block.text == ANSWER

    async def streamed() -> str:
        options: Any = {"base_url": server.url, "api_key": KEY, "max_retries": 0, "timeout": WAIT_S}
        async with anthropic.AsyncAnthropic(**options) as other:
            asked: Any = {"model": "demo", "messages": QUESTION, "max_tokens": 30, "extra_body": GREEDY}
            async with other.messages.stream(**asked) as stream:
                return await stream.get_final_text()

    assert asyncio.run(streamed()) == ANSWER


# errors


def test_bad_requests_name_the_fault(client: anthropic.Anthropic) -> None:
    image: Any = {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    long = [{"role": "user", "content": "a " * 3000}]
    wrong: list[tuple[Any, str]] = [
        ({"messages": [{"role": "user", "content": [image]}]}, "'image' are not supported"),
        ({"messages": long}, "prompt is too long"),
        ({"tools": [{"type": "web_search_20250305", "name": "web_search"}]}, "'web_search_20250305' are not supported"),
    ]
    for asked, message in wrong:
        with pytest.raises(anthropic.BadRequestError, match=message) as error:
            ask(client, **asked)
        assert error.value.type == "invalid_request_error" and error.value.request_id


def test_a_refused_stream_is_an_error_with_its_status(client: anthropic.Anthropic) -> None:
    with (
        pytest.raises(anthropic.BadRequestError, match="prompt is too long"),
        client.messages.stream(model="demo", messages=[{"role": "user", "content": "a " * 3000}], max_tokens=3),
    ):
        pass


def test_a_wrong_key_is_refused_and_a_right_one_accepted_in_both_headers(server: Server) -> None:
    with pytest.raises(anthropic.AuthenticationError) as error:
        ask(client_of(server, api_key="wrong"))
    assert error.value.type == "authentication_error" and "--api-key" in str(error.value)
    for options in ({"api_key": KEY}, {"api_key": "no", "default_headers": {"x-api-key": KEY}}):
        assert ask(client_of(server, **options)).content
        assert client_of(server, **options).models.list().data
