"""/encode and /classify."""

from typing import Any

import pytest

from quartet.runtime import limits
from quartet.runtime.messages import Finish, Generate, Message
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.harness import Script, asynchronous, ends, floats, served, step

CROSS_ENCODER = Embedding(pooling=("cls",), encoder=True, cross_encoder=True, causal=False, labels=1)
NOTHING = Finish(reason="length", length=0)


def vectors(*values: float, scalar: bool = False) -> Script:
    def script(generate: Generate) -> list[Message]:
        vector = floats(*values)
        return [step(generate.request.rid, prompt_tokens=4, vector=vector, scalar=scalar, finish=NOTHING)]

    return script


@pytest.mark.parametrize("path", ["/encode", "/classify"])
@asynchronous
async def test_a_vector_per_prompt(path: str) -> None:
    async with served(vectors(0.5, -0.5), is_embedding=True) as server:
        body = (await server.client.post(path, {"text": "a", "rid": "r", "model": "any", "sampling_params": {}})).json()
        assert body["embedding"] == [0.5, -0.5]
        assert body["meta_info"].pop("e2e_latency") >= 0
        assert body["meta_info"] == {
            "id": "r",
            "finish_reason": {"type": "length", "length": 0},
            "prompt_tokens": 4,
            "weight_version": "v1",
        }
        assert len((await server.client.post(path, {"input_ids": [[1, 2], [3]]})).json()) == 2
        assert {item.request.task for item in await server.ring.sent_of(Generate)} == {"embed"}


@asynchronous
async def test_a_pair_is_scored_by_one_number() -> None:
    async with served(vectors(5.25, scalar=True), embedding=CROSS_ENCODER) as server:
        [body] = (await server.client.post("/encode", {"text": [["query", "document"]]})).json()
        assert body["embedding"] == 5.25
        [sent] = await server.ring.sent_of(Generate)
        assert (sent.text, sent.text_pair) == ("query", "document")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({}, "At least one of text, input_ids, or image should be provided"),
        ({"text": "a", "input_ids": [1]}, "text and input_ids cannot be provided at the same time"),
        ({"text": [["a", "b", "c"]]}, "A pair has two texts, got 3."),
        ({"text": "a", "image_data": "x"}, "image_data is not supported."),
        ({"text": "a", "dimensions": 0}, "dimensions must be in [1, 4], got 0."),
        ({"text": "a", "dimensions": 2}, "does not support matryoshka representation"),
        ({"text": [["query", "document"]]}, "no cross-encoder"),
        ({"input_ids": [1000]}, "vocab size (1000)"),
    ],
)
@asynchronous
async def test_refusals(body: dict[str, Any], words: str) -> None:
    async with served(is_embedding=True) as server:
        answer = await server.client.post("/encode", body)
        assert answer.status == 400
        assert words in answer.json()["error"]["message"]


@asynchronous
async def test_dimensions_travel_to_the_worker_where_the_model_lists_them() -> None:
    embedding = Embedding(pooling=("lasttoken",), matryoshka=True, dimensions=(2, 4))
    async with served(vectors(0.5, -0.5), embedding=embedding) as server:
        assert (await server.client.post("/encode", {"text": "a", "dimensions": 2})).status == 200
        [sent] = await server.ring.sent_of(Generate)
        assert sent.request.dimensions == 2
        answer = await server.client.post("/encode", {"text": "a", "dimensions": 3})
        assert (answer.status, "[2, 4]" in answer.text) == (400, True)


@asynchronous
async def test_an_aborted_text_has_no_vector_to_answer_with() -> None:
    async with served(ends(Finish(reason="abort", message="Aborted")), is_embedding=True) as server:
        answer = await server.client.post("/encode", {"text": ["a", "b"]})
        assert (answer.status, "was aborted" in answer.text) == (400, True)


@asynchronous
async def test_a_generation_model_has_no_embeddings() -> None:
    async with served() as server:
        answer = await server.client.post("/encode", {"text": "a"})
        assert answer.status == 400
        assert "--is-embedding" in answer.json()["error"]["message"]


@asynchronous
async def test_more_numbers_than_an_answer_may_have_are_refused_before_they_are_asked_for(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_VECTOR_NUMBERS", 7)
    async with served(is_embedding=True) as server:
        answer = await server.client.post("/encode", {"text": ["a", "b"]})
        assert (answer.status, "have 8 numbers together; at most 7" in answer.text) == (413, True), answer.text
        assert not server.ring.sent
