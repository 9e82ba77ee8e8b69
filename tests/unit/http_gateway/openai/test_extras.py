"""What the OpenAI endpoints tell beside a choice: ids, hidden states, the native meta_info, distributions."""

from typing import Any

import pytest

from quartet.runtime.messages import Finish, Generate, Logprobs, Message, pack_ids
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"
PROMPT = {CHAT: {"messages": [{"role": "user", "content": "hi"}]}, COMPLETIONS: {"prompt": "hi"}}
HIDDEN = {"hidden_states": floats(1.0, 2.0, 3.0, 4.0), "hidden_size": 2}


def script(generate: Generate) -> list[Message]:
    """Two tokens, with whatever the request asks for."""
    request = generate.request
    scores = None
    if request.logprobs is not None:
        scores = Logprobs(
            ids=pack_ids([5, 6]),
            values=floats(-0.5, -0.25),
            texts=[b"a", b"b"] if request.logprobs.text else None,
            entropies=floats(0.75, 0.5),
            support_counts=pack_ids([2, 1]),
            support_ids=pack_ids([5, 7, 6]),
            support_values=floats(-0.125, 0.0),
        )
    first = {"prompt_ids": pack_ids([1, 2])} if request.return_prompt_ids else {}
    hidden = HIDDEN if request.return_hidden_states else {}
    end = Finish(reason="length", length=2)
    return [step(request.rid, [5, 6], "ab", prompt_tokens=2, logprobs=scores, finish=end, **first, **hidden)]


async def choice_of(path: str, **body: Any) -> dict[str, Any]:
    async with with_hidden_states() as server:
        answer = await server.client.post(path, {**PROMPT[path], **body})
        assert answer.status == 200, answer.text
        found: dict[str, Any] = answer.json()["choices"][0]
        return found


def with_hidden_states() -> Any:
    return served(script, enable_return_hidden_states=True)


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@asynchronous
async def test_nothing_stands_beside_a_choice_unasked(path: str) -> None:
    found = await choice_of(path)
    assert not found.keys() & {"token_ids", "prompt_token_ids", "hidden_states", "meta_info"}


@asynchronous
async def test_token_ids_come_with_the_prompts_in_completions_and_without_in_chats() -> None:
    found = await choice_of(COMPLETIONS, return_token_ids=True)
    assert (found["token_ids"], found["prompt_token_ids"]) == ([5, 6], [1, 2])
    found = await choice_of(CHAT, return_token_ids=True)
    assert found["token_ids"] == [5, 6] and "prompt_token_ids" not in found
    found = await choice_of(CHAT, return_prompt_token_ids=True)
    assert found["prompt_token_ids"] == [1, 2] and "token_ids" not in found


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@asynchronous
async def test_the_hidden_state_behind_the_last_token(path: str) -> None:
    assert (await choice_of(path, return_hidden_states=True))["hidden_states"] == [3.0, 4.0]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@asynchronous
async def test_the_native_meta_info_has_the_native_logprobs(path: str) -> None:
    logprobs = True if path == CHAT else 0
    found = (await choice_of(path, return_meta_info=True, logprobs=logprobs, rid="r"))["meta_info"]
    assert (found["id"], found["completion_tokens"], found["prompt_tokens"]) == ("r", 2, 2)
    assert found["finish_reason"] == {"type": "length", "length": 2}
    assert found["output_token_logprobs"] == [[-0.5, 5, "a"], [-0.25, 6, "b"]]
    assert "output_token_entropy" not in found


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@asynchronous
async def test_distributions_are_told_in_meta_info_without_logprobs_that_nobody_asked_for(path: str) -> None:
    found = await choice_of(path, return_entropy=True, return_sampling_mask=True, top_k=4)
    assert found["logprobs"] is None
    meta = found["meta_info"]
    assert meta["output_token_entropy"] == [0.75, 0.5]
    assert meta["output_token_sampling_mask"] == [[5, 7], [6]]
    assert meta["output_token_sampling_logprobs"] == [-0.125, 0.0]
    assert "output_token_logprobs" not in meta


@asynchronous
async def test_the_native_api_tells_the_same() -> None:
    async with served(script) as server:
        body = {"text": "hi", "return_entropy": True, "return_prompt_token_ids": True}
        answer = (await server.client.post("/generate", body)).json()
        assert answer["prompt_token_ids"] == [1, 2]
        assert answer["meta_info"]["output_token_entropy"] == [0.75, 0.5]
        assert not {"output_token_logprobs", "output_token_sampling_mask"} & answer["meta_info"].keys()


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
@asynchronous
async def test_a_stream_tells_ids_as_they_come_and_the_rest_at_the_end(path: str) -> None:
    async with with_hidden_states() as server:
        asks = {"return_token_ids": True, "return_meta_info": True, "return_hidden_states": True, "stream": True}
        events = (await server.client.post(path, {**PROMPT[path], **asks})).events()
        choices = [choice for event in events for choice in event["choices"]]
        assert [id for choice in choices for id in choice.get("token_ids", [])] == [5, 6]
        ends = [choice for choice in choices if choice["finish_reason"]]
        assert [end["meta_info"]["completion_tokens"] for end in ends] == [2]
        hidden = [(c.get("delta") or c).get("hidden_states") for c in choices]
        assert [vector for vector in hidden if vector] == [[3.0, 4.0]]


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/generate"])
@asynchronous
async def test_a_mask_without_a_bound_is_refused(path: str) -> None:
    prompt = {"text": "hi"} if path == "/generate" else PROMPT[path]
    async with served(script) as server:
        answer = await server.client.post(path, {**prompt, "return_sampling_mask": True})
        assert answer.status == 400 and "return_sampling_mask needs a top_k" in answer.text


@asynchronous
async def test_hidden_states_need_the_flag() -> None:
    async with served(script) as server:
        answer = await server.client.post(CHAT, {**PROMPT[CHAT], "return_hidden_states": True})
        assert (answer.status, answer.json()["param"]) == (400, "return_hidden_states")


@asynchronous
async def test_a_required_thought_stands_before_what_a_schema_constrains() -> None:
    body = {"text": "hi", "require_reasoning": True}
    schema = {"sampling_params": {"json_schema": "{}"}}
    async with served(script, reasoning_parser="qwen3") as server:
        assert (await server.client.post("/generate", {**body, **schema})).status == 200
        assert server.ring.sent[-1].request.thought.closing == "</think>"
        assert (await server.client.post("/generate", {"text": "hi", **schema})).status == 200
        assert server.ring.sent[-1].request.thought is None
        answer = await server.client.post("/generate", {**body, "sampling_params": {"regex": "a"}})
        assert answer.status == 400 and "require_reasoning" in answer.text
    async with served(script) as server:
        assert (await server.client.post("/generate", body)).status == 200
        answer = await server.client.post("/generate", {**body, **schema})
        assert answer.status == 400 and "--reasoning-parser" in answer.text


@asynchronous
async def test_a_budget_of_thought_is_for_models_whose_thoughts_are_known() -> None:
    async with served(script, reasoning_parser="qwen3") as server:
        for body in ({"max_thinking_tokens": 7}, {"sampling_params": {"thinking_budget": 7}}):
            assert (await server.client.post("/generate", {"text": "hi", **body})).status == 200
            request = server.ring.sent[-1].request
            assert request.params.thinking_budget == 7 and request.thought.closing == "</think>"
        twice = {"text": "hi", "max_thinking_tokens": 7, "sampling_params": {"thinking_budget": 8}}
        answer = await server.client.post("/generate", twice)
        assert answer.status == 400 and "two names for one limit" in answer.text
        unset = {"text": "hi", "max_thinking_tokens": 7, "sampling_params": {"thinking_budget": None}}
        assert (await server.client.post("/generate", unset)).status == 200
        assert server.ring.sent[-1].request.params.thinking_budget == 7
        whole = {"text": "hi", "max_thinking_tokens": 7, "sampling_params": {"regex": "a"}}
        assert (await server.client.post("/generate", whole)).status == 200
        assert server.ring.sent[-1].request.thought is None  # nothing may stand before what the regex says
    async with served(script) as server:
        answer = await server.client.post("/generate", {"text": "hi", "max_thinking_tokens": 7})
        assert answer.status == 400 and "thinking_budget" in answer.text
