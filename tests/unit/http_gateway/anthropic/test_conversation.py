"""A body of Anthropic's API becomes a chat completion."""

import json
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.anthropic.conversation import (
    MOST_OPENED,
    PART_CHARS,
    chat_body,
    conversation,
    encoded_in_parts,
)
from quartet.http_gateway.anthropic.types import ConversationBody, MessagesBody
from quartet.http_gateway.openai.types import ChatBody
from quartet.runtime.errors import RequestError

HI = [{"role": "user", "content": "hi"}]
SCHEMA = {"type": "object", "properties": {"city": {"type": "string"}}}
TOOL = {"name": "weather", "description": "of a city", "input_schema": SCHEMA}
USE = {"type": "tool_use", "id": "toolu_1", "name": "weather", "input": {"city": "Köln"}}


def chat(**fields: Any) -> ChatBody:
    return chat_body(msgspec.convert({"messages": HI, "max_tokens": 10, **fields}, MessagesBody))


def messages_of(*messages: dict[str, Any], **fields: Any) -> list[dict[str, Any]]:
    return conversation(msgspec.convert({"messages": list(messages), **fields}, ConversationBody)).messages


def result(content: Any, **fields: Any) -> dict[str, Any]:
    return {
        "role": "user",
        "content": [{"type": "tool_result", "tool_use_id": "toolu_1", "content": content, **fields}],
    }


def text(words: str, **fields: Any) -> dict[str, Any]:
    return {"type": "text", "text": words, **fields}


def refusal(**fields: Any) -> RequestError:
    with pytest.raises(RequestError) as refused:
        chat(**fields)
    return refused.value


@pytest.mark.parametrize("system", ["be brief", [text("be brief", cache_control={"type": "ephemeral"})]])
def test_the_system_prompt_is_the_first_message(system: Any) -> None:
    assert messages_of(*HI, system=system) == [{"role": "system", "content": "be brief"}, *HI]


def test_text_blocks_are_joined_by_line_breaks() -> None:
    blocks = [text("a"), text("b")]
    assert messages_of({"role": "user", "content": blocks}, system=blocks) == [
        {"role": "system", "content": "a\nb"},
        {"role": "user", "content": "a\nb"},
    ]


def test_the_billing_line_is_left_out_of_the_prompt() -> None:
    billing = "x-anthropic-billing-header: cc_version=2.1; cch=ab12;"
    plain = messages_of(*HI, system="You are an agent.")
    assert messages_of(*HI, system=[text(billing), text("You are an agent.")]) == plain
    assert messages_of(*HI, system=f"{billing}\nYou are an agent.") == plain
    assert messages_of(*HI, system=[text(billing)]) == HI


@pytest.mark.parametrize("system", [None, "", []])
def test_an_empty_system_prompt_makes_no_message(system: Any) -> None:
    assert messages_of(*HI, system=system) == HI


def test_consecutive_messages_of_one_role_are_merged() -> None:
    system = {"role": "system", "content": "b"}
    user, more = {"role": "user", "content": "c"}, {"role": "user", "content": [text("d")]}
    answers = [{"role": "assistant", "content": "e"}, {"role": "assistant", "content": [USE]}]
    first, second, third, _ = messages_of(system, user, more, *answers, result("rain"), system="a")
    assert first == {"role": "system", "content": "a\nb"}
    assert second == {"role": "user", "content": "c\nd"}
    assert third["content"] == "e" and len(third["tool_calls"]) == 1


def test_a_system_message_keeps_its_position() -> None:
    roles = ("user", "system", "user", "assistant")
    assert [message["role"] for message in messages_of(*({"role": role, "content": "x"} for role in roles))] == list(
        roles
    )


def test_tool_use_and_tool_result_become_chat_messages() -> None:
    turn = {"role": "assistant", "content": [text("I look."), USE]}
    _, call_turn, tool = messages_of(*HI, turn, result("sunny"))
    assert call_turn["content"] == "I look."
    [call] = call_turn["tool_calls"]
    assert (call["id"], call["type"], call["function"]["name"]) == ("toolu_1", "function", "weather")
    assert json.loads(call["function"]["arguments"]) == {"city": "Köln"}
    assert tool == {"role": "tool", "tool_call_id": "toolu_1", "content": "sunny"}


def test_a_turn_without_text_has_null_content() -> None:
    assert messages_of(*HI, {"role": "assistant", "content": [USE]}, result("rain"))[1]["content"] is None


@pytest.mark.parametrize(
    ("content", "read"), [("a", "a"), ([text("a"), text("b")], "a\nb"), (None, ""), ([], ""), ("", "")]
)
def test_a_tool_result_is_text_or_text_blocks(content: Any, read: str) -> None:
    assert messages_of(*HI, result(content))[1]["content"] == read


def test_the_result_of_a_failed_call_is_marked() -> None:
    assert messages_of(*HI, result([text("no such city")], is_error=True))[1]["content"] == "Error: no such city"


def test_tool_results_and_text_keep_their_order() -> None:
    both = [*result("a")["content"], *result("b")["content"], text("and now?"), text("well?")]
    found = messages_of({"role": "user", "content": both})
    assert [(message["role"], message["content"]) for message in found] == [
        ("tool", "a"),
        ("tool", "b"),
        ("user", "and now?\nwell?"),
    ]


def test_thinking_becomes_reasoning_content_and_redacted_thinking_is_dropped() -> None:
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "of another server"},
        {"type": "redacted_thinking", "data": "c2VjcmV0"},
        {"type": "thinking", "thinking": "", "signature": "omitted"},
        text("Paris."),
    ]
    [message] = messages_of({"role": "assistant", "content": blocks})
    assert message == {"role": "assistant", "content": "Paris.", "reasoning_content": "hm"}


@pytest.mark.parametrize("kind", ["image", "document", "search_result"])
def test_blocks_other_than_text_are_refused_with_type_and_path(kind: str) -> None:
    block = {"type": kind, "source": {"type": "base64", "media_type": "image/png", "data": "AA=="}}
    refused = refusal(messages=[*HI, {"role": "user", "content": [text("see"), block]}])
    assert refused.message == f"messages.1.content.1: blocks of type '{kind}' are not supported, only text is."
    refused = refusal(messages=[*HI, result([text("see"), block])])
    assert f"'toolu_1': blocks of type '{kind}' are not supported" in refused.message


@pytest.mark.parametrize(
    ("role", "block"),
    [
        ("user", USE),
        ("assistant", result("a")["content"][0]),
        ("system", USE),
        ("user", {"type": "thinking", "thinking": "a"}),
    ],
)
def test_a_block_in_a_message_of_the_wrong_role_is_refused(role: str, block: dict[str, Any]) -> None:
    assert refusal(messages=[{"role": role, "content": [block]}]).message == (
        f"messages.0.content.0: blocks of type '{block['type']}' are not allowed in a message of role '{role}'."
    )


@pytest.mark.parametrize("before", [[], [{"type": "text", "text": "I look."}]])
def test_a_final_tool_call_cannot_be_continued(before: list[Any]) -> None:
    call = {"type": "tool_use", "id": "a", "name": "f", "input": {}}
    with pytest.raises(RequestError, match=r"messages\.1.*tool_result") as refused:
        chat(messages=[*HI, {"role": "assistant", "content": [*before, call]}])
    assert refused.value.field == "messages"


def test_a_final_assistant_message_is_continued() -> None:
    assert chat(messages=[*HI, {"role": "assistant", "content": "Pa"}]).continue_final_message
    assert not chat().continue_final_message


def test_tools_are_functions() -> None:
    [plain, strict] = chat(tools=[TOOL, TOOL | {"type": "custom", "strict": True}]).tools or []
    assert plain.plain() == {
        "type": "function",
        "function": {"name": "weather", "description": "of a city", "parameters": SCHEMA},
    }
    assert strict.function.strict


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        ({"type": "web_search_20250305", "name": "web_search"}, "tools.1: tools of type 'web_search_20250305' are not"),
        ({"name": "weather"}, "tools.1: input_schema is required"),
    ],
)
def test_server_tools_and_tools_without_a_schema_are_refused(tool: dict[str, Any], message: str) -> None:
    assert refusal(tools=[TOOL, tool]).message.startswith(message)


def test_mcp_servers_are_refused() -> None:
    assert "mcp_servers" in refusal(mcp_servers=[{"name": "x"}]).message
    assert chat(mcp_servers=[]).tools is None


@pytest.mark.parametrize("thread", [{"type": "create"}, {"type": "continue", "previous_message_id": "msg_1"}])
def test_threads_are_refused(thread: dict[str, str]) -> None:
    """The messages of a thread that goes on are without those before: nothing may be answered to them alone."""
    refused = refusal(thread=thread)
    assert (refused.field, refused.code) == ("thread", "thread_unsupported_request")
    assert chat(thread=None).messages == HI


@pytest.mark.parametrize(
    ("choice", "read"),
    [
        (None, None),
        ({"type": "auto"}, "auto"),
        ({"type": "any"}, "required"),
        ({"type": "none"}, "none"),
        (
            {"type": "tool", "name": "weather"},
            {"function": {"name": "weather"}, "type": "function", "allowed_tools": None},
        ),
    ],
)
def test_tool_choices(choice: Any, read: Any) -> None:
    body = chat(tools=[TOOL], tool_choice=choice)
    assert msgspec.to_builtins(body.tool_choice) == read
    assert body.parallel_tool_calls is None


def test_parallel_tool_use_can_be_disabled() -> None:
    assert (
        chat(tools=[TOOL], tool_choice={"type": "auto", "disable_parallel_tool_use": True}).parallel_tool_calls is False
    )


def test_tool_choice_tool_needs_a_name() -> None:
    assert "name is required" in refusal(tools=[TOOL], tool_choice={"type": "tool"}).message


@pytest.mark.parametrize(
    ("thinking", "enabled"),
    [
        ({"type": "enabled", "budget_tokens": 9}, True),
        ({"type": "adaptive"}, True),
        ({"type": "disabled"}, False),
    ],
)
def test_thinking_sets_the_template_variables(thinking: Any, enabled: bool) -> None:
    assert chat(thinking=thinking).chat_template_kwargs == {"enable_thinking": enabled, "thinking": enabled}
    assert chat().chat_template_kwargs is None


def test_budget_tokens_bound_the_thought_of_a_model_that_thinks() -> None:
    body = msgspec.convert(
        {"messages": HI, "max_tokens": 10, "thinking": {"type": "enabled", "budget_tokens": 9}}, MessagesBody
    )
    assert chat_body(body).thinking_budget == 9
    assert chat_body(body, thinks=False).thinking_budget is None
    assert chat(thinking={"type": "adaptive"}).thinking_budget is None


@pytest.mark.parametrize("budget", [None, 0, -1, 10, 1024])
def test_budget_tokens_must_be_below_max_tokens(budget: int | None) -> None:
    assert "budget_tokens" in refusal(thinking={"type": "enabled", "budget_tokens": budget}).message


def test_output_config_sets_schema_and_effort() -> None:
    body = chat(output_config={"effort": "max", "format": {"type": "json_schema", "schema": SCHEMA}})
    assert body.reasoning_effort == "max" and body.response_format is not None
    assert body.response_format.json_schema is not None and body.response_format.json_schema.schema_ == SCHEMA


def test_output_format_is_another_name_for_the_format_of_output_config() -> None:
    form = {"type": "json_schema", "schema": SCHEMA}
    for fields in ({"output_format": form}, {"output_format": form, "output_config": {"format": form}}):
        body = chat(**fields)
        assert body.response_format is not None and body.response_format.json_schema is not None
        assert body.response_format.json_schema.schema_ == SCHEMA
    other = {"format": {"type": "json_schema", "schema": {"type": "array"}}}
    assert refusal(output_format=form, output_config=other).field == "output_format"


def test_sampling_parameters_are_passed_on() -> None:
    body = chat(temperature=0.5, top_p=0.9, top_k=5, stop_sequences=["a", "b"], stream=True, metadata={"user_id": "u"})
    assert (body.temperature, body.top_p, body.top_k, body.max_tokens, body.stream) == (0.5, 0.9, 5, 10, True)
    assert body.stop == ["a", "b"]
    assert (chat(top_k=0).top_k, chat(stop_sequences=[]).stop) == (None, None)


@pytest.mark.parametrize(
    "value",
    [
        {"text": '[{"\\\n é 😀' * 50_000, '"key"': "k" * (PART_CHARS + 1), "": ""},
        {"many": {str(index): [index] for index in range(MOST_OPENED + 1)}, "few": [[], {}, None, True, 1.5, 2**70]},
        {"end": "x" * PART_CHARS + '"', "half": "😀" * (PART_CHARS // 2) + "é" * PART_CHARS},
        {},
    ],
)
def test_arguments_that_are_encoded_in_parts_are_those_encoded_at_once(value: dict[str, Any]) -> None:
    assert b"".join(encoded_in_parts(value)) == msgspec.json.encode(value)


def test_a_long_text_in_the_arguments_is_encoded_part_by_part() -> None:
    parts = list(encoded_in_parts({"text": '"' * (8 * PART_CHARS)}))
    assert max(map(len, parts)) <= 2 * PART_CHARS
