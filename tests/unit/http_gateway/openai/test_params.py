"""Parameters of OpenAI requests: names, defaults and where they come from, bodies that a router has rewritten."""

import json
from typing import Any

import pytest

from quartet.runtime.messages import Generate
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import VOCAB, Served, asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
MESSAGES = [{"role": "user", "content": "hi"}]


async def params_of(server: Served, path: str, **body: Any) -> SamplingParams:
    prompt = {"prompt": "hi"} if path != CHAT else {"messages": MESSAGES}
    answer = await server.client.post(path, prompt | body)
    assert answer.status == 200, answer.text
    generates = [message for message in server.ring.sent if isinstance(message, Generate)]
    params: SamplingParams = generates[-1].request.params
    return params


@asynchronous
async def test_a_completion_has_16_tokens_and_a_turn_all_there_is_room_for() -> None:
    async with served(says("x")) as server:
        assert (await params_of(server, COMPLETIONS)).max_new_tokens == 16
        assert (await params_of(server, CHAT)).max_new_tokens is None
        assert (await params_of(server, CHAT, max_tokens=5)).max_new_tokens == 5
        assert (await params_of(server, CHAT, max_tokens=5, max_completion_tokens=7)).max_new_tokens == 7


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@asynchronous
async def test_every_parameter_arrives_by_its_native_name(path: str) -> None:
    given = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 7,
        "min_p": 0.1,
        "min_tokens": 2,
        "max_tokens": 9,
        "frequency_penalty": 0.1,
        "presence_penalty": 0.2,
        "repetition_penalty": 1.1,
        "stop": ["a", "b"],
        "stop_token_ids": [4],
        "stop_regex": "x+",
        "seed": 11,
        "logit_bias": {"3": -1.0},
        "ignore_eos": True,
        "no_stop_trim": True,
        "skip_special_tokens": False,
        "regex": "[a-z]+",
    }
    renamed = {"min_tokens": "min_new_tokens", "max_tokens": "max_new_tokens", "seed": "sampling_seed"}
    async with served(says("x")) as server:
        params = await params_of(server, path, **given)
        arrived = {name: getattr(params, renamed.get(name, name)) for name in given}
        assert arrived == given


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT, "/generate"])
@asynchronous
async def test_stop_ids_of_other_tokenizers_are_left_out(path: str) -> None:
    ids = [4, None, VOCAB, -1, 10**30, VOCAB - 1]
    given = (
        {"sampling_params": {"stop_token_ids": ids}, "text": "hi"} if path == "/generate" else {"stop_token_ids": ids}
    )
    async with served(says("x")) as server:
        assert (await params_of(server, path, **given)).stop_token_ids == [4, VOCAB - 1]


@asynchronous
async def test_stop_ids_that_are_no_numbers_are_refused() -> None:
    async with served(says("x")) as server:
        body = {"text": "hi", "sampling_params": {"stop_token_ids": ["4"]}}
        answer = await server.client.post("/generate", body)
        assert (answer.status, "stop_token_ids" in answer.text) == (400, True)


@asynchronous
async def test_what_a_request_leaves_out_comes_from_the_model() -> None:
    config = {"temperature": 0.6, "top_p": 0.95, "top_k": 0, "repetition_penalty": 1.05, "eos_token_id": 2}
    async with served(says("x")) as server:
        server.gateway.model.generation_config = config
        params = await params_of(server, CHAT)
        assert (params.temperature, params.top_p, params.top_k, params.repetition_penalty) == (0.6, 0.95, -1, 1.05)
        assert (await params_of(server, CHAT, temperature=0)).temperature == 0
        await server.client.post("/generate", {"text": "hi"})
        assert server.ring.sent[-1].request.params.temperature == 1.0  # the native API keeps its own


@asynchronous
async def test_the_operator_can_keep_the_model_out_of_it() -> None:
    async with served(says("x"), sampling_defaults="openai") as server:
        server.gateway.model.generation_config = {"temperature": 0.6}
        assert (await params_of(server, CHAT)).temperature == 1.0


@asynchronous
async def test_the_operator_s_parameters_lie_over_the_model_s_and_under_the_request_s() -> None:
    async with served(says("x"), preferred_sampling_params='{"temperature": 0.3, "top_k": 5}') as server:
        server.gateway.model.generation_config = {"temperature": 0.6}
        params = await params_of(server, COMPLETIONS, top_k=9)
        assert (params.temperature, params.top_k) == (0.3, 9)


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@asynchronous
async def test_a_body_that_a_router_has_rewritten_is_as_good_as_before(path: str) -> None:
    nulls = dict.fromkeys(("model", "temperature", "top_p", "n", "stop", "seed", "stream_options", "response_format"))
    spelt_out = {
        "no_stop_trim": False,
        "ignore_eos": False,
        "continue_final_message": False,
        "skip_special_tokens": True,
        "separate_reasoning": True,
        "stream_reasoning": True,
        "return_hidden_states": False,
        "return_bytes": False,
        "return_entropy": False,
        "background": False,
        "no_logs": False,
        "log_metrics": True,
        "logprobs": False,
        "stream": False,
        "something_else": {"of": "its own"},
    }
    async with served(says("x")) as server:
        assert await params_of(server, path, **nulls, **spelt_out) == await params_of(server, path)


@asynchronous
async def test_response_formats_become_grammars() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}}
    formats: list[tuple[dict[str, Any], str, Any]] = [
        ({"type": "json_schema", "json_schema": {"name": "x", "schema": schema}}, "json_schema", schema),
        ({"type": "json_schema", "schema": schema}, "json_schema", schema),
        ({"type": "json_object"}, "json_schema", {"type": "object"}),
    ]
    async with served(says("x")) as server:
        for wanted, kind, expected in formats:
            params = await params_of(server, CHAT, response_format=wanted)
            assert params.grammar is not None
            assert (params.grammar[0], json.loads(params.grammar[1])) == (kind, expected)
        assert (await params_of(server, CHAT, response_format={"type": "text"})).grammar is None
        assert (await params_of(server, CHAT, json_schema=schema)).grammar == ("json_schema", json.dumps(schema))


@asynchronous
async def test_keys_salts_and_priorities_ride_along() -> None:
    async with served(says("x"), schedule_policy="priority") as server:
        await params_of(server, CHAT, extra_key="k", cache_salt="s", priority=4, log_metrics=False)
        request = server.ring.sent[-1].request
        assert (request.extra_key, request.priority, request.log_metrics) == ("ks", 4, False)


@asynchronous
async def test_a_seed_gives_each_copy_its_own() -> None:
    async with served(says("x")) as server:
        await params_of(server, COMPLETIONS, seed=5, n=3)
        seeds = [m.request.seed for m in server.ring.sent if m.request.params.max_new_tokens]
        assert seeds == [5, 6, 7]


@pytest.mark.parametrize("path", [COMPLETIONS, CHAT])
@pytest.mark.parametrize(("bias", "status"), [(3.5e38, 400), (-1e300, 400), (-3.4e38, 200)])
@asynchronous
async def test_a_bias_that_is_no_number_of_float32_is_refused_by_name(path: str, bias: float, status: int) -> None:
    body = {"prompt": "hi"} if path == COMPLETIONS else {"messages": [{"role": "user", "content": "hi"}]}
    async with served(says("x")) as server:
        answer = await server.client.post(path, {"logit_bias": {"3": bias}, **body})
        assert answer.status == status, answer.text
        assert status == 200 or answer.json()["error"]["param"] == "logit_bias"
