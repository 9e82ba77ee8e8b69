"""Conversations of agents on templates that refuse what agents send."""

from typing import Any

import pytest

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Chat
from quartet.tokenizer_service.chat import ChatTemplate
from quartet.tokenizer_service.turns import in_turns

FREE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
SYSTEM_FIRST = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}"
    "{{ raise_exception('System message must be at the beginning.') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}{% endfor %}"
)
ALTERNATING = (
    "{% set rest = messages[1:] if messages[0].role == 'system' else messages %}"
    "{% for m in rest %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate') }}{% endif %}<{{ m.role }}>{{ m.content }}{% endfor %}"
)
PARTS = (
    "{% for m in messages %}{% if m.role == 'system' and not loop.first %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}>{% if m.content is string %}{{ m.content }}{% else %}{% for part in m.content %}[{{ part.text }}]"
    "{% endfor %}{% endif %}{% endfor %}"
)


def message(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


# the messages of Claude Code, which puts instructions behind the question, and of Codex, which sends two of each role
BEHIND = [message("system", "Be an agent."), message("user", "Hi"), message("system", "Agents: none")]
DOUBLED = [
    message("system", "Be an agent."),
    message("system", "Skills: none"),
    message("user", "The directory is /x"),
    message("user", "Hi"),
]


def rendered(source: str, messages: list[dict[str, Any]], **more: Any) -> str:
    return ChatTemplate({"default": source}, {}, 1000).render(Chat(messages=messages, **more))


@pytest.mark.parametrize("messages", [BEHIND, DOUBLED])
def test_a_template_that_takes_a_conversation_gets_it_as_it_was_sent(messages: list[dict[str, Any]]) -> None:
    assert rendered(FREE, messages) == "".join(f"<{m['role']}>{m['content']}" for m in messages)


@pytest.mark.parametrize(
    ("source", "messages", "prompt"),
    [
        (SYSTEM_FIRST, BEHIND, "<system>Be an agent.<user>Hi\n\nAgents: none"),
        (SYSTEM_FIRST, DOUBLED, "<system>Be an agent.\n\nSkills: none<user>The directory is /x\n\nHi"),
        (ALTERNATING, DOUBLED, "<user>The directory is /x\n\nHi"),
    ],
)
def test_a_template_that_refuses_it_gets_turns(source: str, messages: list[dict[str, Any]], prompt: str) -> None:
    assert rendered(source, messages) == prompt


def test_turns_extend_the_prompt_of_the_turn_before() -> None:
    later = [*BEHIND, message("assistant", "Hello"), message("user", "More"), message("system", "Be quick")]
    assert rendered(SYSTEM_FIRST, later).startswith(rendered(SYSTEM_FIRST, BEHIND))


def test_parts_stay_parts() -> None:
    messages = [message("user", [{"type": "text", "text": "Hi"}]), message("system", "Be quick")]
    assert rendered(PARTS, messages) == "<user>[Hi][Be quick]"


def test_texts_and_parts_become_parts_in_their_order() -> None:
    part = {"type": "text", "text": "b"}
    assert in_turns([message("user", "a"), message("user", [part, part]), message("system", "c")]) == [
        message("user", [{"type": "text", "text": "a"}, part, part, {"type": "text", "text": "c"}])
    ]


def test_what_several_have_said_is_under_no_name_of_one() -> None:
    assert in_turns([message("user", "a", name="Al"), message("user", "b", name="Bo")]) == [message("user", "a\n\nb")]
    assert in_turns([message("user", "a", name="Al"), message("user", "b", name="Al")]) == [
        message("user", "a\n\nb", name="Al")
    ]


def test_a_final_message_is_continued_in_turns_too() -> None:
    messages = [*DOUBLED, message("assistant", "Hel")]
    prompt = rendered(SYSTEM_FIRST, messages, add_generation_prompt=False, continue_final_message=True)
    assert prompt.endswith("<assistant>Hel")


def test_what_a_template_refuses_in_turns_too_is_a_400_with_its_words() -> None:
    messages = [message("user", "Hi"), message("assistant", "a"), message("assistant", "b"), message("system", "c")]
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        rendered(ALTERNATING, messages)


def test_messages_that_are_no_turns_are_not_joined() -> None:
    """A query and a document, which a template for chats refuses: joined, they would be scored as something else."""
    pair = [message("user", "query"), message("user", "document")]
    with pytest.raises(RequestError, match="Conversation roles must alternate"):
        rendered(ALTERNATING, pair, as_it_is=True)


def test_calls_and_their_results_stay_where_they_are() -> None:
    call = message("assistant", "", tool_calls=[{"id": "1"}])
    result = message("tool", "42", tool_call_id="1")
    assert in_turns([message("user", "Hi"), call, result, message("system", "c")]) == [
        message("user", "Hi"),
        call,
        result,
        message("user", "c"),
    ]
