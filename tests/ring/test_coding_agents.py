"""Requests in the shape of coding agents' own, shortened, against a real server whose template is a strict one."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.servers import Server

pytestmark = pytest.mark.slow

STRICT = """{%- for message in messages %}
{%- if message.role == 'system' and not loop.first %}{{ raise_exception('System message must be at the beginning.') }}
{%- endif %}<|{{ message.role }}|>{{ message.content }}
{%- if loop.first and tools %}{{ tools | tojson }}{% endif %}
{%- for call in message.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}{% endfor %}
{%- if add_generation_prompt %}<|assistant|>{% endif %}"""
COMMAND = {"type": "object", "properties": {"command": {"const": "echo 42"}}, "required": ["command"]}
RESULT = "42"

# as Claude Code sends it
MESSAGES: dict[str, Any] = {
    "model": "local",
    "max_tokens": 32000,
    "stream": True,
    "thinking": {"type": "adaptive"},
    "output_config": {"effort": "high"},
    "context_management": {"edits": [{"type": "clear_thinking_20251015", "keep": "all"}]},
    "metadata": {"user_id": '{"session_id":"1"}'},
    "system": [
        {"type": "text", "text": "x-anthropic-billing-header: cc_version=2; cch=1;"},
        {"type": "text", "text": "You are an agent.", "cache_control": {"type": "ephemeral"}},
    ],
    "messages": [
        {"role": "user", "content": [{"type": "text", "text": "Print it.", "cache_control": {"type": "ephemeral"}}]},
        {"role": "system", "content": "Available agents: none"},
    ],
    "tools": [
        {"name": "Bash", "description": "Runs a command.", "input_schema": COMMAND},
        {"name": "Read", "description": "Reads a file.", "input_schema": {"type": "object", "properties": {}}},
    ],
}
# as Codex sends it
RESPONSES: dict[str, Any] = {
    "model": "local",
    "stream": True,
    "store": False,
    "include": ["reasoning.encrypted_content"],
    "prompt_cache_key": "1",
    "client_metadata": {"session_id": "1"},
    "parallel_tool_calls": False,
    "reasoning": {"summary": "auto"},
    "input": [
        {
            "type": "message",
            "id": "msg_1",
            "role": "developer",
            "content": [{"type": "input_text", "text": "An agent."}],
        },
        {
            "type": "message",
            "id": "msg_2",
            "role": "developer",
            "content": [{"type": "input_text", "text": "Skills: 0"}],
        },
        {"type": "message", "id": "msg_3", "role": "user", "content": [{"type": "input_text", "text": "In /x"}]},
        {"type": "message", "id": "msg_4", "role": "user", "content": [{"type": "input_text", "text": "Print it."}]},
    ],
    "tools": [
        {"type": "function", "name": "exec_command", "strict": False, "parameters": COMMAND},
        {
            "type": "namespace",
            "name": "agents",
            "description": "Sub-agents.",
            "tools": [{"type": "function", "name": "close", "strict": False, "parameters": {"type": "object"}}],
        },
        {"type": "web_search", "external_web_access": False},
    ],
}


@pytest.fixture(scope="module")
def client(
    launch_for_module: Callable[..., Server], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[httpx.Client]:
    template: Path = tmp_path_factory.mktemp("template") / "strict.jinja"
    template.write_text(STRICT)
    server = launch_for_module(
        "--tool-call-parser", "hermes", "--chat-template", str(template), "--leave-out-hosted-tools"
    )
    with httpx.Client(base_url=server.url, timeout=120) as found:
        yield found


def events(client: httpx.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]


def test_the_loop_of_claude_code(client: httpx.Client) -> None:
    choice = {"type": "tool", "name": "Bash", "disable_parallel_tool_use": True}
    first = events(client, "/v1/messages?beta=true", {**MESSAGES, "tool_choice": choice})
    [start] = [event["content_block"] for event in first if event["type"] == "content_block_start"]
    parts = [event["delta"]["partial_json"] for event in first if event["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == {"command": "echo 42"}
    assert first[-2]["delta"]["stop_reason"] == "tool_use"

    call = {**start, "input": json.loads("".join(parts))}
    result = {"type": "tool_result", "tool_use_id": start["id"], "content": RESULT, "is_error": False}
    turns = [{"role": "assistant", "content": [call]}, {"role": "user", "content": [result]}]
    second = events(client, "/v1/messages?beta=true", {**MESSAGES, "messages": MESSAGES["messages"] + turns})
    used, before = second[-2]["usage"], first[-2]["usage"]
    assert second[-2]["delta"]["stop_reason"] in ("end_turn", "tool_use", "model_context_window_exceeded")
    assert used["cache_read_input_tokens"] >= before["input_tokens"] + before["cache_read_input_tokens"] - 16


def test_the_loop_of_codex(client: httpx.Client) -> None:
    choice = {"type": "function", "name": "exec_command"}
    first = events(client, "/v1/responses", {**RESPONSES, "tool_choice": choice})[-1]["response"]
    [call] = first["output"]
    assert json.loads(call["arguments"]) == {"command": "echo 42"}
    assert [tool["type"] for tool in first["tools"]] == ["function", "namespace"]

    output = {"type": "function_call_output", "call_id": call["call_id"], "output": RESULT}
    body = {**RESPONSES, "input": [*RESPONSES["input"], call, output], "max_output_tokens": 8}
    second = events(client, "/v1/responses", body)[-1]["response"]
    assert second["status"] in ("completed", "incomplete")
    assert second["usage"]["input_tokens_details"]["cached_tokens"] >= first["usage"]["input_tokens"] - 16


def test_a_web_search_of_claude_code_is_refused_by_name(client: httpx.Client) -> None:
    search = {"type": "web_search_20250305", "name": "web_search", "max_uses": 8}
    answer = client.post("/v1/messages", json={**MESSAGES, "tools": [search]})
    assert answer.status_code == 400 and "web_search_20250305" in answer.json()["error"]["message"]
