"""The routes of text-embeddings-inference: /embed, /similarity, /predict, and /rerank with its fields."""

from typing import Any

import pytest

from quartet.runtime.messages import Finish, Generate, Message
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

NOTHING = Finish(reason="length", length=0)
CROSS_ENCODER = Embedding(pooling=("cls",), encoder=True, cross_encoder=True, causal=False, labels=1)
CLASSIFIER = Embedding(pooling=("cls",), encoder=True, cross_encoder=True, causal=False, labels=2)
WITH_PROMPTS = Embedding(pooling=("mean",), prompts={"query": "find: "})


def vector_of(generate: Generate) -> list[Message]:
    """(1, 0) for a text that ends with a, else (0.6, 0.8)."""
    vector = floats(1.0, 0.0) if (generate.text or "").endswith("a") else floats(0.6, 0.8)
    return [step(generate.request.rid, prompt_tokens=4, vector=vector, finish=NOTHING)]


def score_of(generate: Generate) -> list[Message]:
    """The length of a pair's document."""
    size = float(len(generate.text_pair or ""))
    return [step(generate.request.rid, prompt_tokens=4, vector=floats(size), scalar=True, finish=NOTHING)]


def two_labels(generate: Generate) -> list[Message]:
    return [step(generate.request.rid, prompt_tokens=4, vector=floats(-1.0, 1.0), finish=NOTHING)]


@pytest.mark.parametrize(
    ("inputs", "expected"),
    [
        ("a", [[1.0, 0.0]]),
        (["a", "b"], [[1.0, 0.0], [0.6, 0.8]]),
        ([1, 2], [[0.6, 0.8]]),
        ([[1], [2]], [[0.6, 0.8], [0.6, 0.8]]),
    ],
)
@asynchronous
async def test_embed_answers_a_list_of_vectors(inputs: Any, expected: list[list[float]]) -> None:
    async with served(vector_of, is_embedding=True) as server:
        answer = await server.client.post("/embed", {"inputs": inputs, "truncate": True})
        assert [pytest.approx(vector) for vector in expected] == answer.json()
        assert all(sent.request.normalize is True and sent.request.truncate for sent in server.ring.sent)


@asynchronous
async def test_the_address_alone_answers_as_the_model_is() -> None:
    async with served(vector_of, is_embedding=True) as server:
        assert (await server.client.post("/", {"inputs": ["a"]})).json() == [[1.0, 0.0]]
        assert (await server.client.get("/")).headers["content-type"].startswith("text/html")
    async with served(two_labels, is_embedding=True, embedding=CLASSIFIER) as server:
        answer = await server.client.post("/", {"inputs": "a"})
        assert answer.json() == (await server.client.post("/predict", {"inputs": "a"})).json()
    async with served(score_of, is_embedding=True, embedding=CROSS_ENCODER) as server:
        asked = {"query": "q", "texts": ["b", "bbb"], "raw_scores": True}
        assert [entry["index"] for entry in (await server.client.post("/", asked)).json()] == [1, 0]
    async with served() as server:
        answer = await server.client.post("/", {"inputs": "a"})
        assert answer.status == 400 and "--is-embedding" in answer.text


@asynchronous
async def test_embed_may_leave_vectors_as_they_are() -> None:
    async with served(vector_of, is_embedding=True) as server:
        await server.client.post("/embed", {"inputs": "a", "normalize": False})
        assert server.ring.sent[0].request.normalize is False


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"inputs": []}, "inputs cannot be empty"),
        ({"inputs": ""}, "inputs cannot be empty"),
        ({"inputs": ["a", ""]}, "inputs cannot be empty"),
        ({"inputs": ["a", 1]}, "inputs must be"),
        ({"inputs": [[1], ["a"]]}, "inputs must be"),
        ({"inputs": [{"text": "a"}]}, "inputs must be"),
        ({"inputs": [[1], [1000]]}, "vocab"),
    ],
)
@asynchronous
async def test_what_embed_cannot_read_is_a_400(body: dict[str, Any], words: str) -> None:
    async with served(vector_of, is_embedding=True) as server:
        answer = await server.client.post("/embed", body)
        assert (answer.status, words in answer.text) == (400, True), answer.text


@asynchronous
async def test_similarity_is_the_cosine_with_the_first_text() -> None:
    async with served(vector_of, is_embedding=True, embedding=WITH_PROMPTS) as server:
        body = {"inputs": {"source_sentence": "a", "sentences": ["b", "ba"]}}
        assert (await server.client.post("/similarity", body)).json() == [pytest.approx(0.6), pytest.approx(1.0)]
        await server.client.post("/similarity", {**body, "parameters": {"prompt_name": "query"}})
        assert [sent.text for sent in server.ring.sent[3:]] == ["find: a", "find: b", "find: ba"]
        empty = await server.client.post("/similarity", {"inputs": {"source_sentence": "a", "sentences": []}})
        assert (empty.status, empty.headers["x-error-field"]) == (400, "inputs.sentences"), empty.text


@asynchronous
async def test_predict_sorts_labels_and_answers_a_batch_with_a_list_for_each() -> None:
    async with served(two_labels, is_embedding=True, embedding=CLASSIFIER) as server:
        [best, other] = (await server.client.post("/predict", {"inputs": "x"})).json()
        assert (best["label"], best["score"] > 0.8 > other["score"]) == ("LABEL_1", True)
        raw = (await server.client.post("/predict", {"inputs": [["x"], ["x", "y"]], "raw_scores": True})).json()
        assert [[label["score"] for label in labels] for labels in raw] == [[1.0, -1.0]] * 2
        pair = (await server.client.post("/predict", {"inputs": ["x", "y"]})).json()
        assert [label["label"] for label in pair] == ["LABEL_1", "LABEL_0"]
        assert [sent.text_pair for sent in server.ring.sent] == [None, None, "y", "y"]
        for inputs in ([["a", "b", "c"]], [[]], [1], []):
            answer = await server.client.post("/predict", {"inputs": inputs})
            assert (answer.status, "inputs" in answer.text) == (400, True), answer.text


@asynchronous
async def test_rerank_with_texts_answers_in_its_own_shape() -> None:
    async with served(score_of, is_embedding=True, embedding=CROSS_ENCODER) as server:
        body = {"query": "q", "texts": ["ab", "abcd", "a"]}
        answer = (await server.client.post("/rerank", {**body, "raw_scores": True, "return_text": True})).json()
        assert answer == [
            {"index": 1, "score": 4.0, "text": "abcd"},
            {"index": 0, "score": 2.0, "text": "ab"},
            {"index": 2, "score": 1.0, "text": "a"},
        ]
        shares = (await server.client.post("/rerank", body)).json()
        assert all(set(entry) == {"index", "score"} and 0 < entry["score"] < 1 for entry in shares)
        both = await server.client.post("/rerank", {**body, "documents": ["a"]})
        assert (both.status, "at the same time" in both.text) == (400, True), both.text
