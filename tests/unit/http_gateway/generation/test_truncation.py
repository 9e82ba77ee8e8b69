"""What asks for a prompt to be cut, and what is sent on to have it done."""

from typing import Any

import pytest

from quartet.runtime.messages import Generate
from quartet.runtime.model_files.embedding import Embedding
from tests.unit.http_gateway.embedding.test_encode import CROSS_ENCODER, vectors
from tests.unit.http_gateway.harness import asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

LONGEST = 128  # of the harness: its context has 512 tokens, its pool 128
EMBEDDER = Embedding(pooling=("lasttoken",))


async def sent(path: str, body: dict[str, Any], **config: Any) -> Generate:
    """The request that a body becomes."""
    script = says("x") if "embedding" not in config else vectors(0.5, scalar=config["embedding"] is CROSS_ENCODER)
    async with served(script, **config) as server:
        answer = await server.client.post(path, body)
        assert answer.status == 200, answer.text
        found: Generate = (await server.ring.sent_of(Generate))[-1]
        return found


@pytest.mark.parametrize(
    ("fields", "cut"),
    [
        ({}, (None, "right")),
        ({"truncate": False}, (None, "right")),
        ({"truncate": "NONE"}, (None, "right")),
        ({"truncate": True}, (LONGEST, "right")),
        ({"truncate": "END"}, (LONGEST, "right")),
        ({"truncate": "START"}, (LONGEST, "left")),
        ({"truncate": 7}, (7, "right")),
        ({"truncate_prompt_tokens": 7}, (7, "right")),
        ({"truncate_prompt_tokens": -1}, (LONGEST, "right")),
        ({"truncate_prompt_tokens": 10**6}, (LONGEST, "right")),
        ({"truncate": True, "truncation_direction": "Left"}, (LONGEST, "left")),
        ({"truncate_prompt_tokens": 7, "truncation_side": "left"}, (7, "left")),
    ],
)
@pytest.mark.parametrize("path", ["/encode", "/v1/embeddings"])
@asynchronous
async def test_texts_to_embed_are_cut_as_several_apis_ask(
    path: str, fields: dict[str, Any], cut: tuple[int | None, str]
) -> None:
    given = {"text": "a"} if path == "/encode" else {"input": "a"}
    request = (await sent(path, {**given, **fields}, embedding=EMBEDDER)).request
    assert (request.truncate, request.truncate_side) == cut


@pytest.mark.parametrize("path", ["/v1/rerank", "/rerank", "/v2/rerank"])
@asynchronous
async def test_documents_to_rank_are_cut(path: str) -> None:
    body = {"query": "q", "documents": ["a"], "truncate_prompt_tokens": 9}
    assert (await sent(path, body, embedding=CROSS_ENCODER)).request.truncate == 9


@pytest.mark.parametrize(
    ("path", "body", "limit"),
    [
        ("/generate", {"text": "a"}, {"sampling_params": {"max_new_tokens": 20}}),
        ("/v1/completions", {"prompt": "a"}, {"max_tokens": 20}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}, {"max_tokens": 20}),
    ],
)
@asynchronous
async def test_prompts_lose_their_start_and_leave_room_for_the_output(
    path: str, body: dict[str, Any], limit: dict[str, Any]
) -> None:
    request = (await sent(path, {**body, **limit, "truncate_prompt_tokens": -1})).request
    assert (request.truncate, request.truncate_side) == (LONGEST - 20, "left")
    assert (await sent(path, {**body, **limit})).request.truncate is None


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@asynchronous
async def test_the_flag_has_every_prompt_cut_at_its_end(path: str) -> None:
    request = (await sent(path, {"text": "a", "prompt": "a"}, allow_auto_truncate=True)).request
    assert (request.truncate, request.truncate_side) == (LONGEST - 1, "right")
    request = (await sent("/encode", {"text": "a"}, allow_auto_truncate=True, embedding=EMBEDDER)).request
    assert request.truncate == LONGEST


@asynchronous
async def test_the_prompt_that_is_run_before_its_copies_is_cut_like_them() -> None:
    async with served(says("x")) as server:
        await server.client.post("/v1/completions", {"prompt": "a", "n": 2, "truncate_prompt_tokens": 5})
        assert {(item.request.truncate, item.request.truncate_side) for item in server.ring.sent} == {(5, "left")}


@pytest.mark.parametrize(("field", "value"), [("truncate_prompt_tokens", 0), ("truncate_prompt_tokens", -2)])
@asynchronous
async def test_no_tokens_at_all_are_refused(field: str, value: int) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post("/v1/completions", {"prompt": "a", field: value})
        assert (answer.status, answer.json()["param"]) == (400, field)


# dimensions


@pytest.mark.parametrize("path", ["/encode", "/v1/embeddings"])
@asynchronous
async def test_a_models_own_size_cuts_nothing(path: str) -> None:
    given = {"text": "a", "input": "a", "dimensions": 4}  # of the harness's model
    assert (await sent(path, given, embedding=EMBEDDER)).request.dimensions is None
