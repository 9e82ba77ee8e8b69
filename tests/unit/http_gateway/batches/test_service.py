"""How requests of a batch are carried out."""

import json

from quartet.http_gateway.batches.service import make_runner
from tests.unit.http_gateway.harness import asynchronous, served


@asynchronous
async def test_an_endpoint_that_breaks_fails_its_request_and_not_the_batch():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async with served() as server:
        runner = make_runner(server.gateway, {"/v1/completions": broken})
        status, body = await runner._execute("POST", "/v1/completions", b"{}")
        assert (status, json.loads(body)["message"]) == (500, "Internal error: ZeroDivisionError")
