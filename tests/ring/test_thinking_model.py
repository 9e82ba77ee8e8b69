"""A small model whose tokenizer has tokens for thoughts and calls: budgets and forced calls, through the real ring."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import anthropic
import jsonschema
import openai
import pytest
from tokenizers import Tokenizer

from tests.model import tiny
from tests.ring.test_openai_client import client_of
from tests.servers import Server

MARKS = ["<think>", "</think>", "<tool_call>", "</tool_call>"]
MESSAGES: Any = [{"role": "user", "content": "hi"}]
TEMPLATE = """{%- for tool in tools or [] %}{{- '<function=' + tool.function.name + '>' }}{%- endfor %}
{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor %}
{{- 'assistant: <think>\\n' if enable_thinking is not defined or enable_thinking else 'assistant: ' }}"""
PARAMETERS: Any = {
    "type": "object",
    "properties": {
        "city": {"type": "string", "pattern": "^[a-z]{1,9}$"},
        "days": {"type": "integer", "minimum": 0, "maximum": 9},
    },
    "required": ["city", "days"],
}
WEATHER: Any = {"type": "function", "function": {"name": "weather", "parameters": PARAMETERS}}


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> Server:
    """Its template shows the calls of Qwen3-Coder, and thoughts."""
    directory: Path = tiny.build("qwen3", tmp_path_factory.mktemp("model"))
    tiny.save_tokenizer(directory, 320 - len(MARKS))
    tokenizer = Tokenizer.from_file(str(directory / "tokenizer.json"))
    tokenizer.add_tokens(MARKS)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    return launch_for_module("--model-path", str(directory), "--dtype", "float32", "--skip-server-warmup")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


def ask(client: openai.OpenAI, budget: int | None, **more: Any) -> Any:
    """The answer; a budget bounds the thought of a model that would go on thinking."""
    body = {} if budget is None else {"thinking_budget": budget}
    asked: Any = {"model": "m", "messages": MESSAGES, "max_tokens": 60, "temperature": 0, **more}
    return client.chat.completions.create(**asked, extra_body={"ignore_eos": True, **body})


@pytest.mark.parametrize("budget", [0, 5, 20])
def test_the_answer_follows_a_thought_whose_budget_is_spent(client: openai.OpenAI, budget: int) -> None:
    endless, answer = ask(client, None), ask(client, budget)
    assert not endless.choices[0].message.content
    assert answer.choices[0].message.content and bool(answer.choices[0].message.reasoning_content) == (budget > 0)
    assert answer.usage.completion_tokens == 60 and budget <= answer.usage.reasoning_tokens <= budget + 1


def test_a_schema_constrains_what_follows_a_thought_whose_budget_is_spent(client: openai.OpenAI) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes"]}}}
    message = ask(client, 8, response_format=schema).choices[0].message
    assert json.loads(message.content) == "yes" and message.reasoning_content


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "weather"}}])
def test_a_forced_call_in_the_model_s_own_format_fits_its_tool(client: openai.OpenAI, choice: Any) -> None:
    asked: Any = {"tools": [WEATHER], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 200}
    answer = ask(client, 6, **asked).choices[0]
    [call] = answer.message.tool_calls
    jsonschema.validate(json.loads(call.function.arguments), PARAMETERS)
    assert answer.finish_reason == "tool_calls" and answer.message.reasoning_content and not answer.message.content
    body = {"ignore_eos": True, "max_thinking_tokens": 6}
    with client.chat.completions.stream(
        model="m", messages=MESSAGES, temperature=0, extra_body=body, **asked
    ) as stream:
        [streamed] = stream.get_final_completion().choices[0].message.tool_calls or ()
    assert streamed.function.arguments == call.function.arguments


def test_anthropic_s_budget_ends_the_thought(server: Server) -> None:
    client = anthropic.Anthropic(base_url=server.url, api_key="none")
    thinking: Any = {"type": "enabled", "budget_tokens": 7}
    asked: Any = {"model": "m", "max_tokens": 40, "messages": MESSAGES, "thinking": thinking}
    message = client.messages.create(**asked, extra_body={"temperature": 0})
    assert [block.type for block in message.content] == ["thinking", "text"]
