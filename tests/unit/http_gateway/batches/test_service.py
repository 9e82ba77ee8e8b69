"""How requests of a batch are carried out."""

import asyncio
import io
import json

from quartet.http_gateway.batches.service import make_runner, sweep
from quartet.http_gateway.routes.file_store import FileStore
from tests.unit.http_gateway.harness import asynchronous, served


@asynchronous
async def test_an_endpoint_that_breaks_fails_its_request_and_not_the_batch():
    async def broken(scope, receive, send):
        raise ZeroDivisionError

    async with served() as server:
        runner = make_runner(server.gateway, {"/v1/completions": broken})
        status, body = await runner._execute("POST", "/v1/completions", b"{}")
        assert (status, json.loads(body)["message"]) == (500, "Internal error: ZeroDivisionError")


@asynchronous
async def test_what_has_had_its_time_is_removed_though_nobody_asks_for_it(tmp_path):
    now = 1000.0
    files = FileStore(str(tmp_path), 10, 60, lambda: now)
    path = files.path_of(files.add(io.BytesIO(b"abc"), 3, "x", "batch").id)
    sweeping = asyncio.create_task(sweep(files, every_s=0.001))
    await asyncio.sleep(0.02)
    assert path.exists()
    now += 60
    while path.exists():
        await asyncio.sleep(0.001)
    sweeping.cancel()
