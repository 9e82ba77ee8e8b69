"""/v1/embeddings, /v1/classify, /v1/rerank and /v1/score."""

import base64
import math
from array import array
from typing import Any

import numpy as np
import pytest

from quartet.runtime.messages import Finish, Generate, Logprobs, Message, pack_ids
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.harness import Script, asynchronous, floats, served, step

NOTHING = Finish(reason="length", length=0)
CROSS_ENCODER = Embedding(pooling=("cls",), encoder=True, cross_encoder=True, causal=False, labels=1)
CLASSIFIER = Embedding(pooling=("cls",), encoder=True, cross_encoder=True, causal=False, labels=3)
SIGMOID = "torch.nn.modules.activation.Sigmoid"


def vectors(*values: float) -> Script:
    """The same vector for every text."""

    def script(generate: Generate) -> list[Message]:
        return [step(generate.request.rid, prompt_tokens=4, vector=floats(*values), finish=NOTHING)]

    return script


def lengths(generate: Generate) -> list[Message]:
    """A pair's score is the length of its document."""
    size = float(len(generate.text_pair or ""))
    return [step(generate.request.rid, prompt_tokens=4, vector=floats(size), scalar=True, finish=NOTHING)]


def labels(*logprobs: float) -> Script:
    def script(generate: Generate) -> list[Message]:
        made = Logprobs(ids=pack_ids([1]), values=floats(-0.5), asked_values=floats(*logprobs))
        finish = Finish(reason="length", length=1)
        return [step(generate.request.rid, [1], "x", prompt_tokens=5, logprobs=made, finish=finish)]

    return script


# /v1/embeddings


@pytest.mark.parametrize(
    ("given", "count"),
    [("a", 1), (["a", "b"], 2), ([1, 2, 3], 1), ([[1, 2], [3]], 2), ([{"text": "a"}, {"text": "b"}], 2)],
)
@asynchronous
async def test_every_form_of_input_gives_a_vector_per_item(given: Any, count: int) -> None:
    async with served(vectors(0.5, -0.25), is_embedding=True, served_model_name="m") as server:
        body = (await server.client.post("/v1/embeddings", {"input": given, "model": "any"})).json()
        assert body["data"] == [
            {"object": "embedding", "embedding": [0.5, -0.25], "index": index} for index in range(count)
        ]
        assert (body["object"], body["model"]) == ("list", "m")
        assert (body["usage"]["prompt_tokens"], body["usage"]["total_tokens"]) == (4 * count, 4 * count)


@asynchronous
async def test_base64_holds_the_float32_bytes() -> None:
    async with served(vectors(0.5, -0.25), is_embedding=True) as server:
        body = (await server.client.post("/v1/embeddings", {"input": "a", "encoding_format": "base64"})).json()
        assert array("f", base64.b64decode(body["data"][0]["embedding"])).tolist() == [0.5, -0.25]


@pytest.mark.parametrize(("form", "precision"), [("binary", "binary"), ("ubinary", "ubinary")])
@asynchronous
async def test_signs_are_packed_as_sentence_transformers_packs_them(form: str, precision: str) -> None:
    from sentence_transformers.util.quantization import quantize_embeddings

    vector = [0.5, -0.25, 0.0, 1.0, -1.0, 2.0, 0.1, -0.1, *[0.3] * 8]
    expected = quantize_embeddings(np.array([vector], dtype=np.float32), precision=precision)[0].tolist()
    async with served(vectors(*vector), is_embedding=True) as server:
        body = (await server.client.post("/v1/embeddings", {"input": "a", "embedding_type": form})).json()
        assert body["data"][0]["embedding"] == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [({}, None), ({"normalized": False}, False), ({"normalize": False}, False), ({"late_chunking": False}, None)],
)
@asynchronous
async def test_a_client_says_whether_vectors_are_of_length_one(given: dict[str, Any], expected: bool | None) -> None:
    async with served(vectors(0.5), is_embedding=True) as server:
        assert (await server.client.post("/v1/embeddings", {"input": "a", **given})).status == 200
        assert server.ring.sent[0].request.normalize is expected


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ({"input": ""}, "Input cannot be empty"),
        ({"input": []}, "Input cannot be empty"),
        ({"input": "  "}, "Input cannot be empty or whitespace only"),
        ({"input": ["a", " "]}, "Input at index 1 cannot be empty"),
        ({"input": [[1], []]}, "Input at index 1 cannot be empty"),
        ({"input": ["a", 1]}, "All items in input list must be strings"),
        ({"input": [1, "a"]}, "All items in input list must be"),
        ({"input": [[1], ["a"]]}, "All items in input list must be integers"),
        ({"input": [1000]}, "vocab size (1000)"),
        ({"input": [{"image": "x"}]}, "image is not supported"),
        ({"input": "a", "dimensions": 2}, "does not support matryoshka representation"),
        ({"input": "a", "encoding_format": "hex"}, "Invalid enum value 'hex'"),
        ({"input": "a", "embedding_type": "int8"}, "Invalid enum value 'int8'"),
        ({"input": "a", "embedding_type": "float", "encoding_format": "float"}, "cannot be given at the same time"),
        ({"input": "a", "late_chunking": True}, "late_chunking is not supported"),
        ({}, "missing required field `input`"),
    ],
)
@asynchronous
async def test_refusals_have_the_openai_shape(body: dict[str, Any], words: str) -> None:
    async with served(is_embedding=True) as server:
        answer = await server.client.post("/v1/embeddings", body)
        assert (answer.status, answer.json()["object"], answer.json()["code"]) == (400, "error", 400)
        assert words in answer.json()["message"]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/embeddings", {"input": "a"}),
        ("/v1/classify", {"input": "a"}),
        ("/v1/rerank", {"query": "a", "documents": ["b"]}),
    ],
)
@asynchronous
async def test_a_generating_model_refuses_them_all(path: str, body: dict[str, Any]) -> None:
    async with served() as server:
        answer = await server.client.post(path, body)
        assert (answer.status, answer.json()["type"]) == (400, "BadRequestError")
        assert answer.json()["message"].startswith("This model does not appear to be an embedding model by default.")


# /v1/classify


@pytest.mark.parametrize(
    ("embedding", "scores", "shares"),
    [
        (CLASSIFIER, (0.0, math.log(2), 0.0), [0.25, 0.5, 0.25]),
        (CROSS_ENCODER, (0.0,), [0.5]),
        (Embedding(pooling=("cls",), labels=2, activation=SIGMOID), (0.25, 0.75), [0.25, 0.75]),
    ],
)
@asynchronous
async def test_a_classifier_gives_a_share_per_label(embedding: Embedding, scores: Any, shares: list[float]) -> None:
    async with served(vectors(*scores), embedding=embedding) as server:
        body = (await server.client.post("/v1/classify", {"input": ["a", "b"]})).json()
        assert [item["index"] for item in body["data"]] == [0, 1]
        assert body["data"][1]["probs"] == pytest.approx(shares, abs=1e-6)
        best = max(range(len(shares)), key=shares.__getitem__)
        assert (body["data"][0]["label"], body["data"][0]["num_classes"]) == (f"LABEL_{best}", len(shares))


@asynchronous
async def test_a_model_without_labels_cannot_classify() -> None:
    async with served(is_embedding=True) as server:
        assert "no labels" in (await server.client.post("/v1/classify", {"input": "a"})).json()["message"]


# /v1/rerank


@asynchronous
async def test_documents_come_back_best_first() -> None:
    async with served(lengths, embedding=CROSS_ENCODER) as server:
        documents = ["aa", "b", "cccc", "dd"]
        body = {"query": "q", "documents": documents, "model": "any"}
        ranked = (await server.client.post("/v1/rerank", body)).json()
        assert [(item["score"], item["document"], item["index"]) for item in ranked] == [
            (4.0, "cccc", 2),
            (2.0, "aa", 0),
            (2.0, "dd", 3),
            (1.0, "b", 1),
        ]
        assert ranked[0]["meta_info"]["finish_reason"] == {"type": "length", "length": 0}
        assert {sent.text for sent in await server.ring.sent_of(Generate)} == {"q"}


@asynchronous
async def test_the_best_few_are_given_without_their_texts_when_asked() -> None:
    async with served(lengths, embedding=CROSS_ENCODER) as server:
        body = {"query": "q", "documents": ["a", "bbb", "cc"], "top_n": 2, "return_documents": False}
        ranked = (await server.client.call("PUT", "/v1/rerank", body)).json()
        assert [item["index"] for item in ranked] == [1, 2]
        assert not any("document" in item for item in ranked)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"query": "", "documents": ["a"]}, "Query cannot be empty"),
        ({"query": " ", "documents": ["a"]}, "Query cannot be empty or whitespace only"),
        ({"query": "q", "documents": []}, "Documents cannot be empty"),
        ({"query": "q", "documents": ["a", ""]}, "Each document must be a non-empty string"),
        ({"query": "q", "documents": ["a", " "]}, "Each document cannot be empty or whitespace only"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "Value error, parameter top_n should be larger than 0."),
    ],
)
@asynchronous
async def test_rerank_refuses_in_the_words_of_the_contract(body: dict[str, Any], message: str) -> None:
    async with served(embedding=CROSS_ENCODER) as server:
        answer = await server.client.post("/v1/rerank", body)
        assert (answer.status, answer.json()["message"]) == (400, message)


@asynchronous
async def test_rerank_needs_both_fields_and_a_cross_encoder() -> None:
    async with served(embedding=CROSS_ENCODER) as server:
        answer = await server.client.post("/v1/rerank", {"query": "q"})
        assert (answer.status, answer.json()["type"]) == (400, "Bad Request")
    async with served(is_embedding=True) as server:
        answer = await server.client.post("/v1/rerank", {"query": "q", "documents": ["a"]})
        assert "no cross-encoder" in answer.json()["message"]


# /rerank and /v2/rerank


@pytest.mark.parametrize(("path", "documents_told"), [("/rerank", True), ("/v2/rerank", False)])
@asynchronous
async def test_ranking_in_the_shape_of_jina_and_cohere(path: str, documents_told: bool) -> None:
    async with served(lengths, embedding=CROSS_ENCODER) as server:
        body = {"query": "q", "documents": ["aa", {"text": "cccc"}, "b"], "top_n": 2, "model": "any"}
        answer = (await server.client.post(path, body)).json()
        assert answer["id"] and answer["usage"]["total_tokens"] == 12
        best, second = answer["results"]
        assert (best["index"], second["index"]) == (1, 0)
        assert best["relevance_score"] == pytest.approx(1 / (1 + math.exp(-4.0)))
        assert best.get("document") == ({"text": "cccc"} if documents_told else None)
        told = (await server.client.post(path, {**body, "return_documents": not documents_told})).json()["results"]
        assert ("document" in told[0]) is not documents_told


@asynchronous
async def test_scores_too_large_to_tell_apart_keep_their_order() -> None:
    def far(generate: Generate) -> list[Message]:
        score = 800.0 + len(generate.text_pair or "")
        rid, end = generate.request.rid, Finish(reason="length", length=0)
        return [step(rid, prompt_tokens=4, vector=floats(score), scalar=True, finish=end)]

    async with served(far, embedding=CROSS_ENCODER) as server:
        answer = (await server.client.post("/rerank", {"query": "q", "documents": ["a", "ccc", "bb"]})).json()
        assert [result["index"] for result in answer["results"]] == [1, 2, 0]


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"query": "", "documents": ["a"]}, "query"),
        ({"query": "q", "documents": []}, "documents"),
        ({"query": "q", "documents": ["a", {"text": " "}]}, "documents"),
        ({"query": "q", "documents": ["a"], "top_n": 0}, "top_n"),
    ],
)
@asynchronous
async def test_ranking_refuses_and_names_the_field(body: dict[str, Any], field: str) -> None:
    async with served(embedding=CROSS_ENCODER) as server:
        answer = await server.client.post("/v2/rerank", body)
        assert (answer.status, answer.json()["param"]) == (400, field)


# /v1/score


@asynchronous
async def test_labels_are_scored_behind_query_and_item() -> None:
    async with served(labels(math.log(0.25), math.log(0.5)), served_model_name="m") as server:
        body = {"query": "is it? ", "items": ["yes", "no"], "label_token_ids": [7, 9], "model": "any"}
        answer = (await server.client.post("/v1/score", body)).json()
        assert answer["scores"] == [pytest.approx([0.25, 0.5]), pytest.approx([0.25, 0.5])]
        assert (answer["object"], answer["model"], answer["usage"]["prompt_tokens"]) == ("scoring", "m", 10)
        sent = await server.ring.sent_of(Generate, 2)
        assert [item.text for item in sent] == ["is it? yes", "is it? no"]
        assert sent[0].request.logprobs.token_ids == [7, 9]


@asynchronous
async def test_softmax_shares_among_the_labels_and_items_may_come_first() -> None:
    async with served(labels(math.log(0.25), math.log(0.5))) as server:
        ids = {"query": [1, 2], "items": [[3], [4]], "label_token_ids": [7, 9]}
        body = {**ids, "apply_softmax": True, "item_first": True}
        answer = (await server.client.post("/v1/score", body)).json()
        assert answer["scores"][0] == pytest.approx([1 / 3, 2 / 3])
        assert [item.input_ids for item in await server.ring.sent_of(Generate, 2)] == [
            pack_ids([3, 1, 2]),
            pack_ids([4, 1, 2]),
        ]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"label_token_ids": []}, "label_token_ids cannot be empty"),
        ({"label_token_ids": [1000]}, "out-of-vocabulary token id 1000"),
        ({"items": []}, "items cannot be empty"),
        ({"items": [[1]]}, "both be texts or both be token ids"),
        ({"temperature": 0.5}, "temperature is not supported"),
        ({"return_token_logprobs": True}, "return_token_logprobs is not supported"),
    ],
)
@asynchronous
async def test_score_refuses(more: dict[str, Any], words: str) -> None:
    async with served() as server:
        body = {"query": "q", "items": ["a"], "label_token_ids": [1], **more}
        answer = await server.client.post("/v1/score", body)
        assert (answer.status, words in answer.json()["message"]) == (400, True), answer.text


@asynchronous
async def test_an_embedding_model_does_not_score() -> None:
    async with served(is_embedding=True) as server:
        answer = await server.client.post("/v1/score", {"query": "q", "items": "a", "label_token_ids": [1]})
        assert "use /encode" in answer.json()["message"]
