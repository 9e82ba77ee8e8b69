"""The `openai` package, unchanged, with tools, schemas and thoughts, against real servers."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.ring.test_openai_client import client_of
from tests.servers import Server

MESSAGES: Any = [{"role": "user", "content": "hi"}]
THINKING = """{%- for message in messages %}{{- message['role'] + ': ' + message['content'] + '\\n' }}{%- endfor %}
{{- 'assistant: <think>\\n' }}"""
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"enum": ["Ulm", "Bonn"]}}, "required": ["city"]},
    },
}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Ulm"}}\n</tool_call>'


def literally(text: str) -> dict[str, str]:
    """A grammar under which any model says this."""
    return {"ebnf": f"root ::= {json.dumps(text)}"}


@pytest.fixture(scope="module")
def client(launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory) -> openai.OpenAI:
    template: Path = tmp_path_factory.mktemp("template") / "thinking.jinja"
    template.write_text(THINKING)
    flags = ("--tool-call-parser", "qwen25", "--reasoning-parser", "qwen3", "--chat-template", str(template))
    return client_of(launch_for_module(*flags))


def ask(client: openai.OpenAI, **more: Any) -> Any:
    """The message of an answer, which is the same whether it is streamed or not."""
    asked: Any = {"model": "demo", "messages": MESSAGES, "temperature": 0, "max_tokens": 120, **more}
    whole: Any = client.chat.completions.create(**asked).choices[0].message
    with client.chat.completions.stream(**asked) as stream:
        streamed: Any = stream.get_final_completion().choices[0].message
    assert (streamed.content or "") == (whole.content or "")
    assert getattr(streamed, "reasoning_content", None) == whole.reasoning_content
    assert arguments(streamed) == arguments(whole)
    return whole


def arguments(message: Any) -> list[tuple[str, str]]:
    return [(call.function.name, call.function.arguments) for call in message.tool_calls or ()]


def test_a_thought_that_the_template_opened_is_told_apart(client: openai.OpenAI) -> None:
    message = ask(client, extra_body=literally("plan\n</think>\n\nAnswer"))
    assert (message.reasoning_content, message.content) == ("plan", "Answer")


def test_a_call_in_an_open_thought_is_found(client: openai.OpenAI) -> None:
    message = ask(client, tools=[WEATHER], extra_body=literally(f"<think>I call it.\n{CALL}"))
    assert message.reasoning_content == "I call it." and arguments(message) == [("weather", '{"city": "Ulm"}')]


def test_two_calls_come_unless_one_is_asked_for(client: openai.OpenAI) -> None:
    twice = literally(f"</think>{CALL}\n{CALL}")
    assert len(arguments(ask(client, tools=[WEATHER], extra_body=twice))) == 2
    assert len(arguments(ask(client, tools=[WEATHER], extra_body=twice, parallel_tool_calls=False))) == 1


def test_raw_line_breaks_in_arguments_reach_the_client_as_json(client: openai.OpenAI) -> None:
    broken = CALL.replace("Ulm", "U\nlm")
    [(_, text)] = arguments(ask(client, tools=[WEATHER], extra_body=literally(f"</think>{broken}")))
    assert json.loads(text) == {"city": "U\nlm"}


@pytest.mark.parametrize("off", [False, True])
def test_a_schema_lets_the_model_think_first_unless_thinking_is_off(client: openai.OpenAI, off: bool) -> None:
    schema: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["yes"]}}}
    body = {"chat_template_kwargs": {"enable_thinking": not off}}
    answer = client.chat.completions.create(
        model="demo", messages=MESSAGES, response_format=schema, extra_body=body, max_tokens=20, temperature=0
    )
    message: Any = answer.choices[0].message
    assert (message.content, bool(message.reasoning_content)) == ('"yes"' if off else None, not off)


def test_demanded_calls_carry_no_key_that_nobody_declared(client: openai.OpenAI) -> None:
    off: Any = {"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}, "parallel_tool_calls": False}
    for choice in ("required", {"type": "function", "function": {"name": "weather"}}):
        for _, text in arguments(ask(client, tools=[WEATHER], tool_choice=choice, **off)):
            assert json.loads(text).keys() == {"city"}


def many_tools(count: int) -> Any:
    """Strict tools as a server of tools declares them, no two of the same schema."""
    shared = {
        "path": {"type": "string", "maxLength": 8, "description": "Where to look. " * 10},
        "mode": {"enum": ["read", "write"]},
        "tags": {"type": "array", "items": {"type": "string", "maxLength": 8}, "maxItems": 2},
    }
    functions = [
        {
            "name": f"tool_{number}",
            "strict": True,
            "parameters": {
                "type": "object",
                "properties": {**shared, f"own_{number}": {"type": "integer", "minimum": number, "maximum": number}},
                "required": ["path", f"own_{number}"],
                "additionalProperties": False,
            },
        }
        for number in range(count)
    ]
    return [{"type": "function", "function": function} for function in functions]


@pytest.mark.parametrize("choice", ["auto", "required", {"type": "function", "function": {"name": "tool_299"}}])
def test_three_hundred_strict_tools_are_answered(client: openai.OpenAI, choice: Any) -> None:
    quiet = {"reasoning_effort": "none", "max_tokens": 400}
    message = ask(client, tools=many_tools(300), tool_choice=choice, **quiet)
    calls = [(name, json.loads(written)) for name, written in arguments(message)]
    for name, given in calls:
        assert given[name.replace("tool", "own")] == int(name.removeprefix("tool_"))
    assert calls or choice == "auto"
    assert choice in ("auto", "required") or [name for name, _ in calls] == ["tool_299"]


def test_a_thought_is_an_item_of_a_response(client: openai.OpenAI) -> None:
    pattern = {"format": {"type": "regex", "pattern": "plan</think>Answer"}}
    asked: Any = {"model": "demo", "input": "hi", "extra_body": {"text": pattern}}
    answer = client.responses.create(**asked)
    assert answer.output_text == "Answer"
    assert [item.type for item in answer.output] == ["reasoning", "message"]
    with client.responses.stream(**asked) as stream:
        kinds = [event.type for event in stream]
        assert stream.get_final_response().output_text == "Answer"
    assert "response.reasoning_text.delta" in kinds and "response.output_text.delta" in kinds
