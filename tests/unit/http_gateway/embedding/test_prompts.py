"""Prompts that a model's files name, before the texts of every route that embeds."""

from typing import Any

import pytest

from quartet.runtime.messages import Finish, Generate, Message
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

PROMPTS = {"query": "find: ", "document": "text: "}
WITH_PROMPTS = Embedding(pooling=("mean",), prompts=PROMPTS)
BY_DEFAULT = Embedding(pooling=("mean",), prompts=PROMPTS, default_prompt="document")
UNPOOLED = Embedding(pooling=("mean",), prompts=PROMPTS, prompts_pooled=False)
NONE = Embedding(pooling=("mean",))
TASKS = Embedding(pooling=("mean",), task_adapters=True)


def vector(generate: Generate) -> list[Message]:
    finish = Finish(reason="length", length=0)
    return [step(generate.request.rid, prompt_tokens=4, vector=floats(1.0), finish=finish)]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/embed", {"inputs": "x"}),
        ("/v1/embeddings", {"input": ["x"]}),
        ("/v1/embeddings", {"input": [{"text": "x"}]}),
        ("/encode", {"text": "x"}),
    ],
)
@asynchronous
async def test_a_prompt_stands_before_each_text(path: str, body: dict[str, Any]) -> None:
    choices: list[dict[str, str]] = [{}, {"prompt_name": "query"}, {"prompt": "so: "}, {"prompt": ""}]
    async with served(vector, is_embedding=True, embedding=BY_DEFAULT) as server:
        for choice in choices:
            answer = await server.client.post(path, {**body, **choice})
            assert answer.status == 200, answer.text
        assert [sent.text for sent in server.ring.sent] == ["text: x", "find: x", "so: x", "x"]


@asynchronous
async def test_the_default_prompt_leaves_token_ids_alone() -> None:
    async with served(vector, is_embedding=True, embedding=BY_DEFAULT) as server:
        assert (await server.client.post("/v1/embeddings", {"input": [1, 2]})).status == 200
        assert server.ring.sent[0].text is None


@pytest.mark.parametrize(
    ("embedding", "body", "words"),
    [
        (WITH_PROMPTS, {"input": "x", "prompt_name": "a"}, "'a' is not among this model's prompts: document, query"),
        (WITH_PROMPTS, {"input": "x", "prompt_name": "query", "prompt": "y"}, "cannot be given at the same time"),
        (WITH_PROMPTS, {"input": [1, 2], "prompt_name": "query"}, "prompt_name is for texts"),
        (UNPOOLED, {"input": "x", "prompt_name": "query"}, "leave the prompt's tokens out"),
        (NONE, {"input": "x", "prompt_name": "query"}, "name no prompts"),
        (TASKS, {"input": "x", "task": "retrieval.query"}, "task adapters are not served"),
        (NONE, {"input": ["x"] * 1000, "prompt": "p" * 4097}, "length <= 4096"),
    ],
)
@asynchronous
async def test_a_prompt_that_cannot_be_used_is_a_400(embedding: Embedding, body: dict[str, Any], words: str) -> None:
    async with served(vector, is_embedding=True, embedding=embedding) as server:
        answer = await server.client.post("/v1/embeddings", body)
        assert (answer.status, words in answer.text) == (400, True), answer.text
