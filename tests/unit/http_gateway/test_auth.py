"""Keys: who may call what."""

import pytest

from http_gateway.app import ENDPOINTS
from http_gateway.auth import Access
from runtime.messages import Finish
from tests.unit.http_gateway.harness import asynchronous, ends, served

ONE_TOKEN = ends(Finish(reason="length", length=1))


USER, ADMIN = "Bearer user", "Bearer admin"


@pytest.mark.parametrize(
    ("keys", "given", "model_info", "flush"),
    [
        ({}, None, 200, 200),
        ({"api_key": "user"}, None, 401, 401),
        ({"api_key": "user"}, "Bearer None", 401, 401),
        ({"api_key": "user"}, USER, 200, 200),
        ({"api_key": "user"}, "user", 401, 401),
        ({"api_key": "user"}, "Basic user", 401, 401),
        ({"api_key": "user"}, "Bearer \xff\xfe", 401, 401),
        ({"api_key": "user", "admin_api_key": "admin"}, USER, 200, 401),
        ({"api_key": "user", "admin_api_key": "admin"}, ADMIN, 401, 200),
        ({"admin_api_key": "admin"}, None, 200, 401),
        ({"admin_api_key": "admin"}, ADMIN, 200, 200),
    ],
)
@asynchronous
async def test_keys(keys: dict[str, str], given: str | None, model_info: int, flush: int) -> None:
    async with served(**keys) as server:
        headers = {"authorization": given} if given else {}
        assert (await server.client.get("/get_model_info", headers=headers)).status == model_info
        answer = await server.client.post("/flush_cache", headers=headers)
        assert answer.status == flush
        if flush == 401:
            assert answer.json() == {"error": "Unauthorized"}


@asynchronous
async def test_only_probes_and_preflights_are_open_without_the_key() -> None:
    async with served(ONE_TOKEN, api_key="k") as server:
        for path in ("/health", "/health_generate", "/livez", "/readyz", "/ready", "/metrics"):
            assert (await server.client.get(path)).status == 200, path
        for path in ("/", "/ping", "/healthXYZ", "/health/../v1/models", "/nope", "//health", "/v1/models", "/HEALTH"):
            assert (await server.client.get(path)).status == 401, path
        headers = {"origin": "http://x", "access-control-request-method": "POST"}
        assert (await server.client.call("OPTIONS", "/generate", headers=headers)).status == 200


def test_every_public_route_is_known() -> None:
    public = {endpoint.path for endpoint in ENDPOINTS if endpoint.access is Access.PUBLIC}
    assert public == {"/health", "/health_generate", "/livez", "/readyz", "/ready"}


@pytest.mark.parametrize("host", ["x/health?", "/", "?", "#", "health", "a@b/health#"])
@asynchronous
async def test_the_host_header_opens_nothing(host: str) -> None:
    async with served(api_key="k") as server:
        assert (await server.client.get("/v1/models", headers={"host": host})).status == 401


@asynchronous
async def test_two_authorization_headers_are_none() -> None:
    async with served(api_key="k") as server:
        twice = {"authorization": "Bearer k", "Authorization": "Bearer k"}
        assert (await server.client.get("/v1/models", headers=twice)).status == 401
