"""The end of a prompt shows where it leaves the model's thought."""

import pytest
from tokenizers import Tokenizer, models

from quartet.runtime.messages import Chat, Generate, Request, Thought, Tokenized
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service.encode import Encoder
from quartet.tokenizer_service.thoughts import place_of
from tests.tokenizers_to_try import byte_level

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


@pytest.mark.parametrize(("learned", "place"), [(True, "before"), (False, "past")])
def test_a_schema_drives_no_model_into_a_thought_that_has_no_token_for_one(learned, place):
    tokenizer = byte_level()
    if not learned:
        tokenizer = Tokenizer(models.BPE(vocab={"h": 0, "i": 1}, merges=[]))
    thought = Thought(opening="<think>", closing="</think>")
    request = Request(rid="r", params=SamplingParams(json_schema="{}"), thought=thought)
    [message] = Encoder(tokenizer).step([Generate(request=request, text="hi")])
    assert isinstance(message, Tokenized) and message.request.thought.place == place
    assert thought.place == "before"  # the gateway's own stays as it was


def limited(tokenizer, prompt, insists=True):
    thought = Thought(opening="<think>", closing="</think>", limited=insists)
    request = Request(rid="r", params=SamplingParams(thinking_budget=5), thought=thought)
    [message] = Encoder(tokenizer).step([Generate(request=request, text=prompt)])
    return message


def test_a_budget_of_thought_gets_the_tokens_that_it_counts_by():
    tokenizer = byte_level()
    tokenizer.add_tokens(["</think>"])
    ids = limited(tokenizer, "hi").request.thought.ids
    assert (ids.opening, ids.closing) == (tokenizer.token_to_id("<think>"), tokenizer.token_to_id("</think>"))
    assert tokenizer.encode("\n").ids[0] in ids.blanks
    assert limited(tokenizer, "hi<think></think>").request.thought.ids is None  # there is nothing left to limit


def test_a_budget_needs_a_token_for_the_end_of_the_thought():
    finish = limited(byte_level(), "hi").finish
    assert (finish.status, finish.field) == (400, "thinking_budget") and "</think>" in finish.message
    assert limited(byte_level(), "hi", insists=False).request.thought.ids is None
