"""What an Engine sends."""

import msgspec
import pytest

from quartet.http_gateway.native import generate_body
from quartet.http_gateway.native.generate_body import GenerateBody
from quartet.http_gateway.openai import types
from quartet.http_gateway.openai.types import ChatBody
from quartet.runtime.api import calls
from quartet.runtime.limits import MAX_BATCH_PROMPTS

BY_NAME = {"text", "input_ids", "sampling_params", "stream", "messages"}  # parameters of the methods themselves
OF_SERVERS = {"model", "data_parallel_rank", "routed_dp_rank", "background", "chat_template", "log_metrics"}
SECOND_NAMES = {"truncate", "truncation_direction"}
OF_VLLM = {"guided_json", "guided_regex", "guided_choice", "guided_grammar", "structured_outputs"}


def fields(body: type) -> set[str]:
    return {field.name for field in msgspec.structs.fields(body)}


def test_generate_takes_every_field_of_the_route_that_is_supported():
    left_out = BY_NAME | {*generate_body.REFUSED} | OF_SERVERS | SECOND_NAMES
    assert set(calls.GenerateFields.__annotations__) == fields(GenerateBody) - left_out


def test_chat_takes_every_field_of_the_route_that_is_supported():
    left_out = BY_NAME | {*types.REFUSED} | OF_SERVERS | OF_VLLM | SECOND_NAMES
    assert set(calls.ChatFields.__annotations__) == fields(ChatBody) - left_out


def test_a_keyword_that_the_server_would_ignore_is_an_error():
    with pytest.raises(TypeError, match=r"argument 'return_logprobs'; did you mean return_logprob\?"):
        calls.generate("x", None, None, False, {"return_logprobs": True})


@pytest.mark.parametrize("name", ["max_tokens", "max_new_tokens", "temperature"])
def test_sampling_parameters_beside_the_prompt_are_led_to_their_place(name):
    with pytest.raises(TypeError, match="go into sampling_params"):
        calls.generate("x", None, None, False, {name: 1})


def test_what_is_not_given_is_not_sent():
    assert calls.generate("x", None, None, False, {}).body == {"text": "x"}
    assert calls.chat([], False, {"temperature": 0}).body == {"messages": [], "temperature": 0}


def test_a_large_batch_is_sent_in_parts_with_what_belongs_to_each():
    prompts, params = [f"prompt {i}" for i in range(2500)], [{"max_new_tokens": i} for i in range(2500)]
    parts = list(calls.parts(calls.generate(prompts, params, None, False, {"return_logprob": True})))
    assert [len(part.body["text"]) for part in parts] == [MAX_BATCH_PROMPTS, MAX_BATCH_PROMPTS, 452]
    assert parts[2].body == {
        "text": prompts[2048:],
        "sampling_params": params[2048:],
        "return_logprob": True,
    }


@pytest.mark.parametrize("prompt", ["x", ["x"] * MAX_BATCH_PROMPTS, [1] * 5000])
def test_a_batch_that_the_server_takes_and_a_long_prompt_are_sent_whole(prompt):
    call = calls.generate(None, None, prompt, False, {}) if prompt[0] == 1 else calls.encode(prompt, None, None)
    assert list(calls.parts(call)) == [call]


def test_embeddings_are_taken_out_of_the_answer():
    read = calls.embed("x", None).read
    assert read({"embedding": [1.0], "meta_info": {}}) == [1.0]
    assert read([{"embedding": [1.0]}, {"embedding": [2.0]}]) == [[1.0], [2.0]]
