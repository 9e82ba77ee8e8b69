"""Bodies made up from the server's own description: nothing they say is answered by a 5xx, and no process dies."""

import re
from collections.abc import Iterator
from typing import Any

import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from schemathesis import GenerationMode

from quartet.http_gateway.admin import openapi
from quartet.http_gateway.app import ENDPOINTS
from tests.servers import Server, launched

WAIT_S = 60
EXAMPLES = 20  # for each operation
MAY_BE_UNAVAILABLE = ("/health", "/health_generate", "/readyz", "/ready")

DESCRIPTION = schemathesis.openapi.from_dict(openapi.document(ENDPOINTS))
OPERATIONS: dict[str, Any] = {
    f"{operation.method.upper()} {operation.path}": operation
    for operation in (found.ok() for found in DESCRIPTION.get_all_operations())
    if "control" not in operation.tags and operation.path not in MAY_BE_UNAVAILABLE
}


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    flags = ("--context-length", "128", "--max-total-tokens", "4096", "--log-level", "warning")
    with launched(*flags) as server:
        yield server


@pytest.mark.parametrize("name", OPERATIONS)
@settings(
    max_examples=EXAMPLES,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(data=st.data())
def test_no_body_is_answered_by_a_5xx(name: str, server: Server, data: st.DataObject) -> None:
    mode = data.draw(st.sampled_from([GenerationMode.POSITIVE, GenerationMode.NEGATIVE]))
    case = data.draw(OPERATIONS[name].as_strategy(generation_mode=mode))
    answer = case.call(base_url=server.url, timeout=WAIT_S)
    assert answer.status_code < 500, (case.as_curl_command(), answer.text)


@pytest.fixture(scope="module")
def response_url(server: Server) -> str:
    """A response that was generated in the background, with a stream."""
    body = {"input": "hi", "background": True, "stream": True, "max_output_tokens": 4}
    events = requests.post(f"{server.url}/v1/responses", json=body, timeout=WAIT_S).text
    found = re.search('"id":"(resp_[^"]+)"', events)
    assert found, events
    return f"{server.url}/v1/responses/{found[1]}"


VALUES = st.sampled_from(["true", "1", "0", "-1", "asc", "99999999999999999999", "٣"]) | st.text(max_size=20)
QUERIES = st.dictionaries(st.sampled_from(["stream", "starting_after", "limit", "order", "after", "include"]), VALUES)


@settings(max_examples=10 * EXAMPLES, suppress_health_check=list(HealthCheck))
@given(query=QUERIES, below=st.sampled_from(["", "/input_items"]))
def test_no_query_of_a_response_is_answered_by_a_5xx(response_url: str, query: dict[str, str], below: str) -> None:
    answer = requests.get(response_url + below, params=query, timeout=WAIT_S)
    assert answer.status_code in (200, 400), (query, answer.text)


ACTIONS = {  # what may be asked of a response: method, what follows its address, query
    "get": ("GET", "", {}),
    "stream again": ("GET", "", {"stream": "true", "starting_after": "1"}),
    "items": ("GET", "/input_items", {}),
    "cancel": ("POST", "/cancel", {}),
    "delete": ("DELETE", "", {}),
}


@settings(max_examples=EXAMPLES, suppress_health_check=list(HealthCheck))
@given(stream=st.booleans(), tokens=st.sampled_from([1, 4, 64]), actions=st.lists(st.sampled_from([*ACTIONS, "go on"])))
def test_no_order_of_calls_about_a_response_leads_to_a_5xx(
    server: Server, stream: bool, tokens: int, actions: list[str]
) -> None:
    address = f"{server.url}/v1/responses"
    body = {"input": "hi", "background": True, "stream": stream, "max_output_tokens": tokens}
    with requests.post(address, json=body, timeout=WAIT_S, stream=True) as answer:
        first = next(line for line in answer.iter_lines(decode_unicode=True) if '"id":' in line)
    [response_id] = re.findall('"id":"(resp_[^"]+)"', first)
    for action in actions:
        if action == "go on":
            more = {"input": "so", "previous_response_id": response_id, "max_output_tokens": 1}
            found = requests.post(address, json=more, timeout=WAIT_S)
        else:
            method, below, query = ACTIONS[action]
            found = requests.request(method, f"{address}/{response_id}{below}", params=query, timeout=WAIT_S)
        assert found.status_code in (200, 400, 404, 409), (action, found.status_code, found.text)


def test_afterwards_every_process_is_the_one_that_was_started(server: Server) -> None:
    assert requests.get(f"{server.url}/health", timeout=WAIT_S).status_code == 200
    assert "restart" not in server.log.lower(), server.log
    assert "Traceback" not in server.log, server.log
