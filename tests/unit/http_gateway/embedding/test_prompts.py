"""Prompts that a model's files name, before the texts of every route that embeds."""

from typing import Any

import msgspec
import pytest

from quartet.runtime.messages import Finish, Generate, Message
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.harness import asynchronous, floats, served, step

PROMPTS = {"query": "find: ", "document": "text: "}
WITH_PROMPTS = Embedding(pooling=("mean",), prompts=PROMPTS)
BY_DEFAULT = Embedding(pooling=("mean",), prompts=PROMPTS, default_prompt="document")
UNPOOLED = Embedding(pooling=("mean",), prompts=PROMPTS, prompts_pooled=False)
NONE = Embedding(pooling=("mean",))
WITHOUT_ADAPTERS = Embedding(pooling=("mean",), task_adapters=True)
TASKS = msgspec.structs.replace(WITHOUT_ADAPTERS, tasks=dict.fromkeys(("query", "document", "cluster"), ""))
WITH_TASKS = msgspec.structs.replace(TASKS, prompts=PROMPTS)
TASK_BY_DEFAULT = msgspec.structs.replace(WITH_TASKS, default_task="document")


def vector(generate: Generate) -> list[Message]:
    finish = Finish(reason="length", length=0)
    return [step(generate.request.rid, prompt_tokens=4, vector=floats(1.0), finish=finish)]


ROUTES = [
    ("/embed", {"inputs": "x"}),
    ("/v1/embeddings", {"input": ["x"]}),
    ("/v1/embeddings", {"input": [{"text": "x"}]}),
    ("/encode", {"text": "x"}),
]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@asynchronous
async def test_a_prompt_stands_before_each_text(path: str, body: dict[str, Any]) -> None:
    choices: list[dict[str, str]] = [{}, {"prompt_name": "query"}, {"prompt": "so: "}, {"prompt": ""}]
    async with served(vector, is_embedding=True, embedding=BY_DEFAULT) as server:
        for choice in choices:
            answer = await server.client.post(path, {**body, **choice})
            assert answer.status == 200, answer.text
        assert [sent.text for sent in server.ring.sent] == ["text: x", "find: x", "so: x", "x"]


@pytest.mark.parametrize(("path", "body"), ROUTES)
@pytest.mark.parametrize(
    ("embedding", "choice", "text", "task"),
    [
        (WITH_TASKS, {}, "x", ""),
        (WITH_TASKS, {"task": None}, "x", ""),
        (WITH_TASKS, {"task": "query"}, "find: x", "query"),
        (WITH_TASKS, {"task": "cluster"}, "x", "cluster"),
        (WITH_TASKS, {"task": "cluster", "prompt_name": "query"}, "find: x", "cluster"),
        (WITH_TASKS, {"task": "query", "prompt": "so: "}, "so: x", "query"),
        (WITH_TASKS, {"prompt_name": "query"}, "find: x", ""),
        (TASK_BY_DEFAULT, {}, "text: x", "document"),
        (TASK_BY_DEFAULT, {"task": "query"}, "find: x", "query"),
        (WITH_PROMPTS, {"task": "anything"}, "x", ""),
    ],
)
@asynchronous
async def test_a_task_chooses_an_adapter_and_its_prompt(
    path: str, body: dict[str, Any], embedding: Embedding, choice: dict[str, Any], text: str, task: str
) -> None:
    async with served(vector, is_embedding=True, embedding=embedding) as server:
        answer = await server.client.post(path, {**body, **choice})
        assert answer.status == 200, answer.text
        [sent] = server.ring.sent
        assert (sent.text, sent.request.task_adapter) == (text, task)


@asynchronous
async def test_token_ids_get_the_adapter_of_a_task_without_its_prompt() -> None:
    async with served(vector, is_embedding=True, embedding=WITH_TASKS) as server:
        assert (await server.client.post("/v1/embeddings", {"input": [1, 2], "task": "query"})).status == 200
        assert (server.ring.sent[0].text, server.ring.sent[0].request.task_adapter) == (None, "query")


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
        (WITHOUT_ADAPTERS, {"input": "x", "task": "query"}, "are not in its directory"),
        (
            TASKS,
            {"input": "x", "task": "other"},
            "task must be one of this model's, got 'other'; they are query, document",
        ),
        (TASKS, {"input": "x", "task": 1}, "got a value of the type int; they are query, document, cluster"),
        (NONE, {"input": ["x"] * 1000, "prompt": "p" * 4097}, "length <= 4096"),
    ],
)
@asynchronous
async def test_a_prompt_that_cannot_be_used_is_a_400(embedding: Embedding, body: dict[str, Any], words: str) -> None:
    async with served(vector, is_embedding=True, embedding=embedding) as server:
        answer = await server.client.post("/v1/embeddings", body)
        assert (answer.status, words in answer.text) == (400, True), answer.text
