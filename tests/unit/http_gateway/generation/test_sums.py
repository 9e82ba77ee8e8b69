"""What a call comes to is counted before it is built."""

from typing import Any

import msgspec
import pytest

from quartet.http_gateway.generation import intake
from quartet.http_gateway.generation.intake import Rules
from quartet.http_gateway.native import generate as native
from quartet.http_gateway.native.generate_body import GenerateBody, to_job
from quartet.runtime.limits import MAX_BODY_VALUES
from quartet.runtime.messages import Generate, unpack_ids
from tests.unit.http_gateway.harness import asynchronous, served, words

NESTED = "[" + ",".join(["[1]"] * (MAX_BODY_VALUES + 1)) + "]"
TEXTS = "[" + ",".join(['""'] * (MAX_BODY_VALUES + 1)) + "]"
VALUES = f"more than {MAX_BODY_VALUES} strings, lists and objects"


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", f'{{"input_ids": {NESTED}}}'),
        ("/generate", f'{{"text": {TEXTS}}}'),
        ("/generate", f'{{"text": "a", "unknown": {NESTED}}}'),
        ("/vertex_generate", f'{{"instances": {TEXTS}}}'),
        ("/tokenize", f'{{"prompt": {TEXTS}}}'),
        ("/detokenize", f'{{"tokens": {NESTED}}}'),
        ("/v1/completions", f'{{"prompt": {NESTED}}}'),
        ("/v1/chat/completions", f'{{"messages": {TEXTS}}}'),
        ("/v1/responses", f'{{"input": {TEXTS}}}'),
        ("/v1/embeddings", f'{{"input": {NESTED}}}'),
        ("/v1/rerank", f'{{"query": "a", "documents": {TEXTS}}}'),
        ("/v1/score", f'{{"query": "a", "items": {TEXTS}}}'),
        ("/encode", f'{{"text": {TEXTS}}}'),
    ],
)
@asynchronous
async def test_too_many_values_are_a_413_before_they_are_decoded(
    path: str, body: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def decode(*args: Any, **fields: Any) -> None:
        raise AssertionError("a body was decoded")

    async with served(words("x")) as server:
        monkeypatch.setattr(msgspec.json, "decode", decode)
        answer = await server.client.post(path, body.encode())
        assert (answer.status, VALUES in answer.text) == (413, True)


@pytest.mark.parametrize("path", ["/generate", "/encode", "/vertex_generate", "/tokenize", "/detokenize"])
@asynchronous
async def test_a_batch_over_the_limit_is_refused_before_a_prompt_is_made(
    path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    body: dict[str, Any] = {"input_ids": [[1]] * 1025, "tokens": [[1]] * 1025}
    body |= {"instances": [{"text": "a"}] * 1025} | ({"prompt": ["a"] * 1025} if path == "/tokenize" else {})
    async with served(is_embedding=path == "/encode") as server:
        monkeypatch.setattr(Generate, "__init__", None)
        answer = await server.client.post(path, body)
        assert answer.status == 400
        assert "at most 1024" in answer.text
        assert "got 1025" in answer.text


@asynchronous
async def test_copies_are_counted_before_they_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    def replace(*args: Any, **fields: Any) -> None:
        raise AssertionError("a copy was made")

    async with served(max_inflight_requests=4096) as server:
        monkeypatch.setattr(intake.msgspec.structs, "replace", replace)
        answer = await server.client.post("/generate", {"text": ["a"] * 1024, "sampling_params": {"n": 64}})
        assert answer.status == 400
        assert answer.json()["error"]["message"] == "One call may hold at most 4096 requests, got 65536."


@asynchronous
async def test_what_all_copies_take_on_the_ring_is_bounded() -> None:
    async with served(max_body_size=1 << 16) as server:
        answer = await server.client.post("/generate", {"text": "a" * 60_000, "sampling_params": {"n": 8}})
        assert answer.status == 413
        assert "8 requests" in answer.text
        assert "4 times --max-body-size" in answer.text
        assert not server.ring.sent


@asynchronous
async def test_the_ids_in_the_parameters_of_all_requests_are_bounded() -> None:
    bias = {str(token): 1.0 for token in range(1000)}
    async with served(max_inflight_requests=4096) as server:
        answer = await server.client.post("/generate", {"text": ["a"] * 1000, "sampling_params": {"logit_bias": bias}})
        assert answer.status == 413
        assert "hold 1000000 ids and strings" in answer.text


def test_parameters_that_prompts_share_are_checked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    looked_at = []
    monkeypatch.setattr(intake, "check_params", lambda params, vocab_size: looked_at.append(params))
    body = msgspec.convert({"text": ["a"] * 100, "sampling_params": {"top_k": 3}, "return_logprob": True}, GenerateBody)
    to_job(body, Rules(vocab_size=100, hidden_size=2))
    assert len(looked_at) == 1


@asynchronous
async def test_keys_that_no_field_has_are_not_looked_up_in_every_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    columns = []
    monkeypatch.setattr(native.msgspec, "convert", lambda fields, kind: columns.append(set(fields)) or kind())
    instances = [{"text": "a", f"key{i}": i} for i in range(1000)]
    async with served() as server:
        await server.client.post("/vertex_generate", {"instances": instances})
    assert {"text", "sampling_params"} in columns
    assert not any(name.startswith("key") for names in columns for name in names)


@asynchronous
async def test_more_numbers_than_a_body_of_that_size_should_have_are_a_413() -> None:
    async with served(words("x"), max_body_size=1 << 16) as server:
        fine = await server.client.post("/generate", {"input_ids": [1] * (1 << 13)})
        many = await server.client.post("/generate", {"input_ids": [1] * ((1 << 13) + 2)})
        assert (fine.status, many.status) == (200, 413)
        assert "more than 8192 numbers" in many.text


@asynchronous
async def test_what_is_made_of_a_large_body_is_made_beside_the_loop() -> None:
    async with served(words("x")) as server:
        for size in (10, 100_000):
            ids = [i % 1000 for i in range(size)]
            assert (await server.client.post("/generate", {"input_ids": ids})).status == 200
            sent = server.ring.sent[-1]
            assert unpack_ids(sent.input_ids).tolist() == ids
        refused = await server.client.post("/generate", {"input_ids": [*range(999), 5000] * 100})
        assert (refused.status, "[5000, 5000" in refused.text) == (400, True)


@asynchronous
async def test_an_integer_that_no_message_can_hold_is_refused() -> None:
    async with served() as server:
        params = {"top_k": 1 << 64, "n": 2}
        answer = await server.client.post("/generate", {"text": "a", "sampling_params": params})
        assert answer.status == 400
        assert "A number in the request is out of range." in answer.text
        assert not server.ring.sent


@pytest.mark.parametrize("field", ["tools", "chat_template_kwargs"])
@asynchronous
async def test_an_integer_in_a_conversation_that_no_message_can_hold_is_refused_for_copies_too(field: str) -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "integer", "maximum": 1 << 64}}}
    given: dict[str, Any] = {
        "tools": [{"type": "function", "function": {"name": "f", "parameters": parameters}}],
        "chat_template_kwargs": {"a": 1 << 64},
    }
    async with served() as server:
        body = {"messages": [{"role": "user", "content": "a"}], "n": 2, field: given[field]}
        answer = await server.client.post("/v1/chat/completions", body)
        assert (answer.status, answer.json()["message"]) == (400, "A number in the request is out of range.")
        assert not server.ring.sent
