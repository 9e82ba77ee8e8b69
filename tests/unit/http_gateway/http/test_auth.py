"""Keys: who may call what."""

import pytest

from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.http.auth import Access
from quartet.runtime.errors import UsageError
from quartet.runtime.messages import Finish
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
            assert answer.json()["error"] == "Unauthorized"
            assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize(
    ("keys", "path", "said"),
    [
        ({"api_key": "user"}, "/v1/models", "the server's key (--api-key)"),
        ({"api_key": "user"}, "/nowhere", "the server's key (--api-key)"),
        ({"api_key": "user"}, "/flush_cache", "the server's key (--api-key)"),
        ({"admin_api_key": "admin"}, "/flush_cache", "the admin key (--admin-api-key)"),
        ({"api_key": "user", "admin_api_key": "admin"}, "/flush_cache", "the ordinary key does not open it"),
        ({"api_key": "user", "admin_api_key": "admin"}, "/v1/models", "the admin key does not open it"),
    ],
)
@asynchronous
async def test_a_401_says_which_key_is_wanted_and_repeats_none(keys: dict[str, str], path: str, said: str) -> None:
    async with served(**keys) as server:
        answer = await server.client.get(path, headers={"authorization": "Bearer wrong"})
        assert answer.status == 401
        assert said in answer.json()["message"]
        assert "wrong" not in answer.text


@pytest.mark.parametrize(
    ("headers", "said"),
    [
        ({}, "The request has no key."),
        ({"authorization": "Bearer other"}, "The request has another key."),
        ({"x-api-key": "other"}, "The request has another key."),
        ({"authorization": "Basic other"}, "The request has such a header twice, or one of another form."),
        ({"x-api-key": "k", "X-Api-Key": "k"}, "The request has such a header twice, or one of another form."),
    ],
)
@asynchronous
async def test_a_401_says_what_the_request_has_instead_of_the_key(headers: dict[str, str], said: str) -> None:
    async with served(api_key="k") as server:
        answer = await server.client.get("/v1/models", headers=headers)
        assert answer.status == 401 and answer.json()["message"].endswith(said)


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"x-api-key": "k"}, 200),
        ({"x-api-key": "wrong"}, 401),
        ({"x-api-key": ""}, 401),
        ({"x-api-key": "Bearer k"}, 401),
        ({"x-api-key": "k", "X-Api-Key": "k"}, 401),
        ({"x-api-key": "k", "authorization": "Bearer of another service"}, 200),
        ({"x-api-key": "of another service", "authorization": "Bearer k"}, 200),
        ({"x-api-key": "wrong", "authorization": "Bearer wrong"}, 401),
    ],
)
@asynchronous
async def test_a_key_may_be_sent_as_x_api_key_too(headers: dict[str, str], status: int) -> None:
    async with served(api_key="k") as server:
        for path in ("/v1/models", "/get_model_info"):
            assert (await server.client.get(path, headers=headers)).status == status


@asynchronous
async def test_each_of_several_keys_opens() -> None:
    async with served(api_key="one, two,three") as server:
        for key, status in [("one", 200), ("two", 200), ("three", 200), ("one, two", 401), ("four", 401), ("", 401)]:
            answer = await server.client.get("/v1/models", headers={"authorization": f"Bearer {key}"})
            assert answer.status == status, key


@pytest.mark.parametrize("encoding", ["utf-8", "latin-1"])
@asynchronous
async def test_a_key_that_is_not_ascii_opens_as_clients_encode_it(encoding: str) -> None:
    async with served(api_key="clé") as server:
        sent = "clé".encode(encoding).decode("latin-1")  # the client of these tests sends Latin-1
        assert (await server.client.get("/v1/models", headers={"authorization": f"Bearer {sent}"})).status == 200
        assert (await server.client.get("/v1/models", headers={"authorization": "Bearer cle"})).status == 401


@pytest.mark.parametrize("blank", ["", " ", ",", "a,", "a,,b"])
@asynchronous
async def test_a_gateway_with_a_blank_key_does_not_start(blank: str) -> None:
    with pytest.raises(UsageError, match="empty key"):
        async with served(api_key=blank):
            pass


@asynchronous
async def test_only_probes_and_preflights_are_open_without_the_key() -> None:
    async with served(ONE_TOKEN, api_key="k") as server:
        for path in (
            "/",
            "/page/app.js",
            "/health",
            "/health_generate",
            "/livez",
            "/readyz",
            "/ready",
            "/ping",
            "/metrics",
        ):
            assert (await server.client.get(path)).status == 200, path
        for path in (
            "/pingXYZ",
            "/healthXYZ",
            "/health/../v1/models",
            "/nope",
            "//health",
            "/v1/models",
            "/HEALTH",
        ):
            assert (await server.client.get(path)).status == 401, path
        headers = {"origin": "http://localhost:8000", "access-control-request-method": "POST"}
        assert (await server.client.call("OPTIONS", "/generate", headers=headers)).status == 200


def test_every_public_route_is_known() -> None:
    public = {endpoint.path for endpoint in ENDPOINTS if endpoint.access is Access.PUBLIC}
    assert public == {
        "/",
        "/page/{name}",
        "/health",
        "/healthz",
        "/health_generate",
        "/livez",
        "/readyz",
        "/ready",
        "/ping",
    }


@pytest.mark.parametrize("host", ["x/health?", "/", "?", "#", "health", "a@b/health#"])
@asynchronous
async def test_the_host_header_opens_nothing(host: str) -> None:
    async with served(api_key="k", allowed_hosts="*") as server:
        assert (await server.client.get("/v1/models", headers={"host": host})).status == 401


@asynchronous
async def test_two_authorization_headers_are_none() -> None:
    async with served(api_key="k") as server:
        twice = {"authorization": "Bearer k", "Authorization": "Bearer k"}
        assert (await server.client.get("/v1/models", headers=twice)).status == 401
