"""GET /v1/models as two APIs describe a model."""

import pytest
from anthropic.types import ModelInfo

from tests.unit.http_gateway.harness import asynchronous, served

VERSION = {"anthropic-version": "2023-06-01"}
NAME = "org/model"


@asynchronous
async def test_anthropic_clients_get_their_own_shape() -> None:
    async with served(served_model_name=NAME) as server:
        listed = (await server.client.get("/v1/models", headers=VERSION)).json()
        assert (listed["has_more"], listed["first_id"], listed["last_id"]) == (False, NAME, NAME)
        answer = await server.client.get(f"/v1/models/{NAME}", headers=VERSION)
        assert listed["data"] == [answer.json()] and answer.headers["request-id"]
        model = ModelInfo.model_validate(answer.json())
        assert (model.id, model.display_name, model.max_tokens) == (NAME, NAME, 512)


@pytest.mark.parametrize("cursor", ["after_id", "before_id"])
@asynchronous
async def test_there_is_only_one_page(cursor: str) -> None:
    async with served(served_model_name=NAME) as server:
        page = (await server.client.get(f"/v1/models?{cursor}={NAME}", headers=VERSION)).json()
        assert page == {"data": [], "has_more": False, "first_id": None, "last_id": None}


@asynchronous
async def test_another_name_of_the_model_finds_it_under_its_own() -> None:
    async with served(served_model_name=NAME) as server:
        server.gateway.model_path = "/models/q4/tiny.gguf"
        for asked in ("tiny.gguf", "/models/q4/tiny.gguf"):
            answer = await server.client.get(f"/v1/models/{asked}", headers=VERSION)
            assert (answer.status, answer.json()["id"]) == (200, NAME)


@asynchronous
async def test_an_unknown_model_is_a_404() -> None:
    async with served(served_model_name=NAME) as server:
        answer = await server.client.get("/v1/models/other", headers=VERSION)
        assert (answer.status, answer.json()["error"]) == (404, {"type": "not_found_error", "message": "model: other"})
        assert (await server.client.get("/v1/models/other")).json()["error"]["code"] == "model_not_found"


@asynchronous
async def test_other_clients_get_openai_s_shape() -> None:
    async with served(served_model_name=NAME, api_key="k") as server:
        key = {"authorization": "Bearer k"}
        [card] = (await server.client.get("/v1/models", headers=key)).json()["data"]
        assert (card["id"], card["object"]) == (NAME, "model")
        assert (await server.client.get("/v1/models")).json()["error"] == "Unauthorized"
        assert (await server.client.get("/v1/models", headers=VERSION)).json()["error"][
            "type"
        ] == "authentication_error"
