"""The end of a prompt shows where it leaves the model's thought."""

import pytest

from runtime.messages import Chat, Thought
from tokenizer_service.thoughts import place_of

THOUGHT = Thought(opening="<think>", closing="</think>", place="before")


@pytest.mark.parametrize(
    ("tail", "place"),
    [
        ("<|im_start|>assistant\n<think>\n", "inside"),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "past"),
        ("<|im_start|>assistant\n", "before"),
        ("what does <think> mean?<|im_end|>\n<|im_start|>assistant\n", "before"),
    ],
)
def test_tags_at_the_end_of_the_prompt_open_or_close_the_thought(tail, place):
    assert place_of(tail, THOUGHT, None) == place


def test_without_a_tag_the_family_knows_best():
    assert place_of("assistant\n", Thought(opening="<think>", closing="</think>", place="inside"), None) == "inside"


@pytest.mark.parametrize(
    ("content", "place"),
    [
        ("<think>\nFirst I", "inside"),
        ("<think>done</think>The ans", "past"),
        ([{"type": "text", "text": "<think>so"}], "inside"),
        ("The answer", "past"),
        ("", "before"),
    ],
)
def test_a_final_message_that_is_continued_may_hold_an_open_thought(content, place):
    chat = Chat(messages=[{"role": "assistant", "content": content}], continue_final_message=True)
    assert place_of("First I", THOUGHT, chat) == place
