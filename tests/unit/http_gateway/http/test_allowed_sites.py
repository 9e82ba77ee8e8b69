"""Web pages that call the server, and the names by which it is called."""

from typing import Any

import pytest

from quartet.http_gateway.app import ENDPOINTS
from quartet.runtime import control
from quartet.runtime.errors import UsageError
from tests.unit.http_gateway.harness import Answer, asynchronous, served, words

OWN = "127.0.0.1:30000"
FOREIGN = "https://evil.example"
TEXT = {"text": "hi"}


async def posted(headers: dict[str, str], path: str = "/generate", method: str = "POST", **settings: Any) -> Answer:
    async with served(words("x"), **settings) as server:
        return await server.client.call(method, path, TEXT if path == "/generate" else None, headers=headers)


@pytest.mark.parametrize(
    "headers",
    [
        {},  # curl, SDKs
        {"origin": f"http://{OWN}"},
        {"origin": "http://localhost:3000"},
        {"origin": "https://localhost"},
        {"origin": "http://app.localhost:8080"},
        {"origin": "http://127.8.9.1:5000"},
        {"origin": "http://[::1]:5000"},
        {"origin": "HTTP://LOCALHOST:3000"},
        {"origin": "http://localhost:3000", "sec-fetch-site": "cross-site"},  # from localhost to 127.0.0.1
        {"sec-fetch-site": "none"},
        {"sec-fetch-site": "same-origin"},
        {"origin": "https://ui.example", "sec-fetch-site": "same-origin"},  # behind a proxy that changes the Host
    ],
)
@asynchronous
async def test_own_and_local_pages_and_clients_without_an_origin_may_generate(headers: dict[str, str]) -> None:
    assert (await posted(headers)).status == 200


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": FOREIGN},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "evil.example"},
        {"origin": "http://localhost.evil.example"},
        {"origin": "http://127.0.0.1.evil.example"},
        {"origin": "http://evil.example:30000"},
        {"origin": "http://localhost:3000@evil.example"},
        {"origin": "http://localhost:3000/evil"},
        {"origin": "http://128.0.0.1"},
        {"origin": "http://[::2]"},
        {"origin": "evil://localhost"},
        {"origin": f"http://{OWN}", "Origin": FOREIGN},
        {"origin": FOREIGN, "sec-fetch-site": "same-site"},
        {"origin": FOREIGN, "sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "Cross-Site"},
    ],
)
@asynchronous
async def test_a_foreign_page_changes_nothing_and_hears_which_flag_would_let_it(headers: dict[str, str]) -> None:
    for path in ("/generate", "/flush_cache", "/abort_request", "/v1/chat/completions", "/update_weights_from_disk"):
        answer = await posted(headers, path)
        assert answer.status == 403, path
        assert "--cors-allow-origins" in answer.json()["message"]


@asynchronous
async def test_a_form_of_a_foreign_page_reaches_no_control_route() -> None:
    headers = {"origin": FOREIGN, "content-type": "application/x-www-form-urlencoded"}
    async with served() as server:
        assert (await server.client.post("/flush_cache", b"", headers=headers)).status == 403
        assert server.ring.sent == []


@pytest.mark.parametrize("path", [path for path, command in control.routes().items() if "GET" in command.methods])
@asynchronous
async def test_an_image_of_a_foreign_page_carries_out_no_command(path: str) -> None:
    assert (await posted({"sec-fetch-site": "cross-site", "sec-fetch-dest": "image"}, path, "GET")).status == 403
    assert (await posted({"origin": FOREIGN}, path, "GET")).status == 403


def test_every_route_of_a_command_is_known_to_change_something() -> None:
    changing = {endpoint.path for endpoint in ENDPOINTS if endpoint.changes_state}
    assert control.routes().keys() <= changing


@asynchronous
async def test_a_foreign_page_makes_no_probe_that_generates() -> None:
    assert (await posted({"sec-fetch-site": "cross-site"}, "/health_generate", "GET")).status == 403
    assert (await posted({}, "/health", "GET")).status == 200


@asynchronous
async def test_a_foreign_page_may_look_but_cannot_read_what_it_gets() -> None:
    answer = await posted({"origin": FOREIGN, "sec-fetch-site": "cross-site"}, "/v1/models", "GET")
    assert answer.status == 200
    assert not [name for name in answer.headers if name.startswith("access-control-")]
    assert answer.headers["vary"] == "Origin"


@pytest.mark.parametrize("origin", ["http://localhost:8000", "https://ui.example"])
@asynchronous
async def test_a_trusted_page_may_read_answers_and_send_credentials(origin: str) -> None:
    answer = await posted({"origin": origin}, cors_allow_origins="https://ui.example")
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == origin
    assert answer.headers["access-control-allow-credentials"] == "true"
    assert "Retry-After" in answer.headers["access-control-expose-headers"]
    assert "Origin" in answer.headers["vary"]


@asynchronous
async def test_with_any_origin_allowed_none_has_credentials() -> None:
    answer = await posted({"origin": FOREIGN, "sec-fetch-site": "cross-site"}, cors_allow_origins="*")
    assert answer.status == 200
    assert answer.headers["access-control-allow-origin"] == "*"
    assert "access-control-allow-credentials" not in answer.headers
    assert (await posted({"origin": "null"}, cors_allow_origins="*")).status == 200


@pytest.mark.parametrize(
    ("allowed", "origin", "status"),
    [
        ("https://ui.example", "https://ui.example", 200),
        ("https://ui.example", "https://ui.example:443", 200),
        ("https://ui.example:443/", "https://ui.example", 200),
        ("HTTPS://UI.example", "https://ui.example", 200),
        ("https://ui.example", "http://ui.example", 403),
        ("https://ui.example", "https://ui.example:8443", 403),
        ("https://ui.example", "https://a.ui.example", 403),
        ("https://a.example, https://b.example", "https://b.example", 200),
        ("null", "null", 200),
        ("chrome-extension://abc", "chrome-extension://abc", 200),
        ("http://[2001:db8::1]:80", "http://[2001:DB8:0::1]", 200),
    ],
)
@asynchronous
async def test_a_listed_origin_is_compared_by_scheme_host_and_port(allowed: str, origin: str, status: int) -> None:
    assert (await posted({"origin": origin}, cors_allow_origins=allowed)).status == status


@pytest.mark.parametrize(("origin", "status"), [("http://localhost:8000", 200), (FOREIGN, 400)])
@asynchronous
async def test_a_preflight_needs_no_key_and_succeeds_for_trusted_pages_only(origin: str, status: int) -> None:
    headers = {
        "origin": origin,
        "access-control-request-method": "POST",
        "access-control-request-headers": "authorization, content-type",
    }
    answer = await posted(headers, "/generate", "OPTIONS", api_key="k")
    assert answer.status == status
    assert answer.headers.get("access-control-allow-origin") == (origin if status == 200 else None)


@pytest.mark.parametrize(
    "host",
    [
        OWN,
        "127.0.0.1",
        "localhost:30000",
        "LOCALHOST:1",
        "localhost.:30000",
        "app.localhost",
        "[::1]:30000",
        "[0:0:0:0:0:0:0:1]",
        "[::ffff:127.0.0.1]:80",
        "0.0.0.0:30000",
    ],
)
@asynchronous
async def test_a_server_on_loopback_answers_to_the_names_of_this_machine(host: str) -> None:
    assert (await posted({"host": host})).status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("evil.example", 403),
        ("evil.example:30000", 403),
        ("localhost.evil.example", 403),
        ("127.0.0.1.evil.example:30000", 403),
        ("192.168.1.5:30000", 403),
        ("[2001:db8::1]:30000", 403),
        ("", 400),
        ("a@localhost", 400),
        ("localhost:30000:1", 400),
        ("localhost:x", 400),
        ("localhost/x", 400),
        ("::1", 400),
        ("[::1", 400),
        ("[1]", 400),
    ],
)
@asynchronous
async def test_a_server_on_loopback_answers_to_no_other_name(host: str, status: int) -> None:
    answer = await posted({"host": host, "origin": f"http://{host}"}, "/v1/models", "GET")  # as after a rebinding
    assert answer.status == status
    assert status == 400 or "--allowed-hosts" in answer.json()["message"]


@asynchronous
async def test_two_host_headers_are_refused() -> None:
    assert (await posted({"host": OWN, "Host": OWN})).status == 400


@pytest.mark.parametrize(
    ("settings", "host", "status"),
    [
        ({"allowed_hosts": "llm.example"}, "llm.example", 200),
        ({"allowed_hosts": "llm.example"}, "LLM.example:443", 200),
        ({"allowed_hosts": "llm.example"}, "localhost", 200),
        ({"allowed_hosts": "llm.example"}, "other.example", 403),
        ({"allowed_hosts": "*"}, "other.example", 200),
        ({"allowed_hosts": "2001:db8::1"}, "[2001:db8::1]:1", 200),
        ({"host": "0.0.0.0"}, "any.example", 200),
        ({"host": "::"}, "any.example", 200),
        ({"host": "0.0.0.0", "allowed_hosts": "llm.example"}, "any.example", 403),
        ({"host": "0.0.0.0", "allowed_hosts": "llm.example"}, "10.1.2.3:30000", 200),  # a probe of Kubernetes
        ({"host": "0.0.0.0", "allowed_hosts": "llm.example"}, "[2001:db8::1]:30000", 200),
        ({"allowed_hosts": "llm.example"}, "10.1.2.3:30000", 403),
        ({"host": "0.0.0.0", "allowed_hosts": "llm.example"}, "llm.example", 200),
        ({"host": "box.lan", "listen_address": "127.0.1.1"}, "box.lan:30000", 200),
        ({"host": "box.lan", "listen_address": "127.0.1.1"}, "evil.example", 403),
        ({"host": "box.lan", "listen_address": "192.168.1.5"}, "any.example", 200),
        ({"host": "::1"}, "evil.example", 403),
        ({"host": "localhost"}, "evil.example", 403),
    ],
)
@asynchronous
async def test_the_names_follow_from_the_address_and_the_flag(settings: Any, host: str, status: int) -> None:
    assert (await posted({"host": host}, **settings)).status == status


@asynchronous
async def test_a_page_that_the_server_itself_shows_may_call_it_under_a_public_name() -> None:
    headers = {"host": "llm.example", "origin": "https://llm.example"}
    assert (await posted(headers, host="0.0.0.0")).status == 200
    assert (await posted({**headers, "host": "llm.example:8443"}, host="0.0.0.0")).status == 403


@pytest.mark.parametrize("wrong", ["ui.example", "https://", "https://ui.example/path", "https://*.example", "*.x"])
@asynchronous
async def test_a_wrong_origin_in_the_flag_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(UsageError, match="--cors-allow-origins takes"):
        async with served(cors_allow_origins=wrong):
            pass


@pytest.mark.parametrize("wrong", ["http://x", "a/b", "*.example", "a b"])
@asynchronous
async def test_a_wrong_name_in_the_flag_is_refused_at_start(wrong: str) -> None:
    with pytest.raises(UsageError, match="--allowed-hosts takes"):
        async with served(allowed_hosts=wrong):
            pass
