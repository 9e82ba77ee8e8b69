"""The API's description of itself."""

import re
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest

from quartet import http_gateway
from quartet.http_gateway.admin import openapi
from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.parsers import call_formats, reasoning
from quartet.runtime.config import ServerConfig
from tests.unit.http_gateway.harness import asynchronous, served

PAGE = Path(http_gateway.__path__[0]) / "admin" / "page" / "docs.html"


def test_every_route_is_described_with_a_body_where_it_takes_one() -> None:
    paths = openapi.document(ENDPOINTS)["paths"]
    for endpoint in ENDPOINTS:
        operations = paths[endpoint.path.replace(":path}", "}")]
        own = {method.lower() for method in endpoint.methods if method != "HEAD"}
        others = {method.lower() for one in ENDPOINTS if one.path == endpoint.path for method in one.methods}
        assert own <= operations.keys() <= others
        for method in own:
            operation = operations[method]
            assert operation["summary"] and "400" in operation["responses"]
            assert ("requestBody" in operation) == (endpoint.body is not None and method != "get"), endpoint.path


def test_every_reference_leads_somewhere() -> None:
    document = openapi.document(ENDPOINTS)
    schemas = document["components"]["schemas"]
    references = set(re.findall(r"#/components/schemas/(\w+)", str(document)))
    assert references and references <= schemas.keys()


def test_a_command_does_not_show_what_only_the_ring_fills_in() -> None:
    abort = openapi.document(ENDPOINTS)["components"]["schemas"]["Abort"]
    assert {"rid", "abort_all"} <= abort["properties"].keys()
    assert not {"id", "type"} & abort["properties"].keys()


def test_operations_have_names_of_their_own() -> None:
    operations = [o for methods in openapi.document(ENDPOINTS)["paths"].values() for o in methods.values()]
    names = [operation["operationId"] for operation in operations]
    assert len(set(names)) == len(names)


@asynchronous
async def test_both_are_served_and_the_description_wants_the_key() -> None:
    async with served(api_key="k") as server:
        assert (await server.client.get("/openapi.json")).status == 401
        answer = await server.client.get("/openapi.json", headers={"authorization": "Bearer k"})
        assert answer.json()["openapi"].startswith("3.")
        page = await server.client.get("/docs")
        assert page.status == 200 and page.headers["content-type"].startswith("text/html")


@asynchronous
async def test_the_operator_can_leave_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(openapi.DISABLED_BY, "1")
    async with served() as server:
        assert (await server.client.get("/openapi.json")).status == 404
        assert (await server.client.get("/docs")).status == 404


def test_the_page_loads_nothing_from_elsewhere() -> None:
    text = PAGE.read_text()
    assert not re.search(r"https?://|(src|href)=\"(?!openapi\.json)", text)


@pytest.mark.parametrize(
    ("flag", "known"), [("tool_call_parser", call_formats.FORMATS), ("reasoning_parser", reasoning.FAMILIES)]
)
def test_the_flags_name_the_parsers_that_there_are(flag: str, known: dict[str, Any]) -> None:
    literal = get_args(get_type_hints(ServerConfig)[flag])[0]
    assert set(get_args(literal)) == known.keys() | {"auto", "none"}
