"""/embed_all, /embed_sparse and /pooling: vectors of tokens, and weights of words."""

import base64
from typing import Any

import pytest

from quartet.runtime import limits
from quartet.runtime.messages import Finish, Generate, Message, pack_ids
from quartet.runtime.model_files.embedding import Dense, Embedding
from quartet.runtime.model_files.vector_kinds import Expansion, MultiVector, Sparse
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

NOTHING = Finish(reason="length", length=0)
PLAIN = Embedding(pooling=("mean",), encoder=True, causal=False)
DECODER = Embedding(pooling=("lasttoken",))
CLASSIFIER = Embedding(pooling=("cls",), encoder=True, causal=False, labels=2)
SPARSE = Embedding(pooling=("cls",), encoder=True, causal=False, sparse=Sparse())
FILLED = Expansion(length=32)
COLBERT = Embedding(
    pooling=("cls",),
    encoder=True,
    causal=False,
    dense=(Dense(in_features=4, out_features=2),),
    multi_vector=MultiVector(expansion=FILLED),
    prompts={"query": "[Q] ", "document": "[D] "},
)


def four_numbers(generate: Generate) -> list[Message]:
    """Two vectors of two, one of four, or two words, as one asks for them; none for an empty text."""
    numbers = floats() if generate.text == "no word" else floats(1.0, 2.0, 3.0, 4.0)
    return [step(generate.request.rid, prompt_tokens=2, vector=numbers, finish=NOTHING)]


def two_words(generate: Generate) -> list[Message]:
    if generate.text == "no word":
        return [step(generate.request.rid, prompt_tokens=2, finish=NOTHING)]
    return [
        step(
            generate.request.rid, prompt_tokens=2, vector=floats(0.5, 2.0), vector_ids=pack_ids([3, 9]), finish=NOTHING
        )
    ]


@asynchronous
async def test_embed_all_answers_a_vector_for_each_token() -> None:
    async with served(four_numbers, is_embedding=True, embedding=COLBERT) as server:
        answer = await server.client.post("/embed_all", {"inputs": ["a", "no word"]})
        assert answer.json() == [[[1.0, 2.0], [3.0, 4.0]], []]
        assert {sent.request.vectors for sent in server.ring.sent} == {"own"}


@asynchronous
async def test_embed_all_asks_any_encoder_for_its_tokens() -> None:
    async with served(four_numbers, is_embedding=True, embedding=PLAIN) as server:
        size = server.gateway.model.hidden_size
        answer = await server.client.post("/embed_all", {"inputs": "a", "truncate": True})
        assert [len(row) for row in answer.json()[0]] == [min(size, 4)] * max(1, 4 // size)
        assert server.ring.sent[0].request.vectors == "tokens" and server.ring.sent[0].request.truncate


@pytest.mark.parametrize(
    ("name", "prefix", "vectors", "fill_to", "truncate"),
    [("query", "[Q] ", "query", 32, 32), ("document", "[D] ", "document", 0, None), (None, "", "own", 0, None)],
)
@asynchronous
async def test_a_prompts_name_says_how_a_model_of_many_vectors_treats_a_text(
    name: str | None, prefix: str, vectors: str, fill_to: int, truncate: int | None
) -> None:
    named = {} if name is None else {"prompt_name": name}
    async with served(four_numbers, is_embedding=True, embedding=COLBERT) as server:
        for path, field in (("/embed_all", "inputs"), ("/pooling", "input"), ("/encode", "text")):
            answer = await server.client.post(path, {field: "a", **named})
            assert answer.status == 200, answer.text
            sent = server.ring.sent.pop()
            assert (sent.text, sent.request.vectors) == (f"{prefix}a", vectors)
            assert (sent.request.fill_to, sent.request.truncate) == (fill_to, truncate)
        found = await server.client.post("/encode", {"text": "a"})
        assert found.json()["embedding"] == [[1.0, 2.0], [3.0, 4.0]]


@asynchronous
async def test_embed_sparse_answers_words_with_their_weights() -> None:
    async with served(two_words, is_embedding=True, embedding=SPARSE) as server:
        words = [{"index": 3, "value": 0.5}, {"index": 9, "value": 2.0}]
        assert (await server.client.post("/embed_sparse", {"inputs": ["a", "no word"]})).json() == [words, []]
        assert (await server.client.post("/encode", {"text": "a"})).json()["embedding"] == words
        assert (await server.client.post("/pooling", {"input": "a"})).json()["data"][0]["data"] == words


@pytest.mark.parametrize(
    ("embedding", "task", "expected"),
    [
        (COLBERT, None, [[1.0, 2.0], [3.0, 4.0]]),
        (COLBERT, "token_embed", [[1.0, 2.0], [3.0, 4.0]]),
        (PLAIN, None, [1.0, 2.0, 3.0, 4.0]),
        (PLAIN, "embed", [1.0, 2.0, 3.0, 4.0]),
    ],
)
@asynchronous
async def test_pooling_answers_in_the_shape_of_vllm(embedding: Embedding, task: str | None, expected: Any) -> None:
    async with served(four_numbers, is_embedding=True, embedding=embedding) as server:
        body = {"input": ["a", "b"], "model": "any", "task": task}
        answer = (await server.client.post("/pooling", body)).json()
        assert answer["data"] == [{"index": i, "object": "pooling", "data": expected} for i in range(2)]
        assert (answer["object"], answer["usage"]["prompt_tokens"]) == ("list", 4) and answer["id"].startswith("pool-")
        short = (await server.client.post("/pooling", {**body, "encoding_format": "base64"})).json()
        assert base64.b64decode(short["data"][0]["data"]) == floats(1.0, 2.0, 3.0, 4.0)


@pytest.mark.parametrize(
    ("embedding", "path", "body", "words"),
    [
        (COLBERT, "/embed", {"inputs": "a"}, "use /pooling or /embed_all"),
        (COLBERT, "/v1/embeddings", {"input": "a"}, "use /pooling or /embed_all"),
        (
            COLBERT,
            "/similarity",
            {"inputs": {"source_sentence": "a", "sentences": ["b"]}},
            "use /pooling or /embed_all",
        ),
        (COLBERT, "/pooling", {"input": "a", "task": "embed"}, "use /pooling or /embed_all"),
        (COLBERT, "/pooling", {"input": "a", "dimensions": 1}, "dimensions is not supported"),
        (COLBERT, "/pooling", {"input": "a", "task": "classify"}, "task"),
        (COLBERT, "/pooling", {"input": []}, "cannot be empty"),
        (COLBERT, "/embed_sparse", {"inputs": "a"}, "does not weigh words"),
        (SPARSE, "/embed", {"inputs": "a"}, "use /embed_sparse"),
        (SPARSE, "/v1/embeddings", {"input": "a"}, "use /embed_sparse"),
        (SPARSE, "/embed_all", {"inputs": "a"}, "use /embed_sparse"),
        (DECODER, "/embed_all", {"inputs": "a"}, "in pieces"),
        (CLASSIFIER, "/embed_all", {"inputs": "a"}, "scores texts"),
        (PLAIN, "/embed_all", {"inputs": "a", "truncate": 5}, "truncate must be true or false, got 5"),
        (PLAIN, "/embed", {"inputs": "a", "truncate": 5}, "truncate must be true or false, got 5"),
        (PLAIN, "/embed", {"inputs": "a", "truncate": "END"}, "truncate must be true or false, got 'END'"),
    ],
)
@asynchronous
async def test_what_a_model_does_not_give_is_a_400(
    embedding: Embedding, path: str, body: dict[str, Any], words: str
) -> None:
    async with served(four_numbers, is_embedding=True, embedding=embedding) as server:
        answer = await server.client.post(path, body)
        assert (answer.status, words in answer.text) == (400, True), answer.text


@asynchronous
async def test_numbers_of_tokens_are_counted_as_they_come_and_too_many_end_the_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(limits, "MAX_VECTOR_NUMBERS", 9)
    async with served(four_numbers, is_embedding=True, embedding=COLBERT) as server:
        assert (await server.client.post("/embed_all", {"inputs": ["a", "b"]})).status == 200
        answer = await server.client.post("/embed_all", {"inputs": ["a", "b", "c"]})
        assert (answer.status, "at most 9 are sent" in answer.text) == (413, True), answer.text
