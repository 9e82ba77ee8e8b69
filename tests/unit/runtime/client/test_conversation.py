"""Messages and the commands that change them."""

import pytest

from quartet.runtime.client.conversation import Conversation, Leave


def test_a_request_holds_the_system_prompt_and_all_that_was_said():
    talk = Conversation("Be brief.")
    talk.add("One?", "Yes.")
    assert [(m["role"], m["content"]) for m in talk.asking("Two?")] == [
        ("system", "Be brief."),
        ("user", "One?"),
        ("assistant", "Yes."),
        ("user", "Two?"),
    ]


def test_a_turn_without_an_answer_is_not_kept():
    talk = Conversation()
    talk.add("One?", "")
    assert talk.asking("Two?") == [{"role": "user", "content": "Two?"}]


def test_the_system_prompt_is_set_and_shown():
    talk = Conversation()
    assert talk.obey("/system") == "no system prompt is set"
    assert talk.obey("/system  Answer in\nrhymes. ") == "the system prompt is set"
    assert talk.obey("/system") == talk.system == "Answer in\nrhymes."


def test_reset_forgets_the_conversation_and_keeps_the_system_prompt():
    talk = Conversation("Be brief.")
    talk.add("One?", "Yes.")
    assert talk.obey("/RESET") == "the conversation is forgotten"
    assert [m["role"] for m in talk.asking("Two?")] == ["system", "user"]


@pytest.mark.parametrize("text", ["Hello", "/etc/hosts is a file", "1/2", "what is /reset?", "/2"])
def test_other_texts_are_messages(text):
    assert Conversation().obey(text) is None


def test_an_unknown_command_is_not_sent_but_answered():
    assert Conversation().obey("/rest") == "unknown command /rest; did you mean /reset?"
    assert Conversation().obey("/model x") == "unknown command /model; /help lists them"


def test_help_names_every_command():
    text = Conversation().obey("/help")
    assert text is not None and all(name in text for name in ("/system", "/reset", "/help", "/exit"))


@pytest.mark.parametrize("text", ["/exit", "/quit", "/bye"])
def test_a_person_may_leave(text):
    with pytest.raises(Leave):
        Conversation().obey(text)
