"""Control endpoints: one per command."""

import pytest

from http_gateway.app import ENDPOINTS
from http_gateway.auth import Access
from runtime import control
from runtime.control import Abort, FlushCache
from runtime.messages import Finish, Generate, Reply
from tests.unit.http_gateway.harness import asynchronous, served, step


@pytest.mark.parametrize("method", ["GET", "POST"])
@asynchronous
async def test_flush_cache_in_the_contracts_words(method: str) -> None:
    async with served() as server:
        done = await server.client.call(method, "/flush_cache?timeout=2.5")
        assert (done.status, done.text.startswith("Cache flushed.\nPlease check backend logs")) == (200, True)
        [command] = await server.ring.sent_of(FlushCache)
        assert command.timeout == 2.5
        server.ring.answers_commands = False
        call = server.client.start(method, "/flush_cache")
        refused = (await server.ring.sent_of(FlushCache, 2))[-1]
        server.ring.push(Reply(id=refused.id, success=False, status=400, message="2 requests run"))
        answer = await call.answer()
        assert (answer.status, answer.text) == (400, "Flush cache failed.\n2 requests run\n")


@asynchronous
async def test_a_command_with_a_bad_value_is_refused_by_name() -> None:
    async with served() as server:
        answer = await server.client.get("/flush_cache?timeout=soon")
        assert (answer.status, answer.json()["success"]) == (400, False)
        assert "timeout" in answer.json()["message"]
        assert (await server.client.post("/flush_cache", {"timeout": "soon"})).status == 400
        assert (await server.client.get("/flush_cache?timeout=nan")).status == 400
        assert (await server.client.post("/flush_cache", {"timeout": -1})).status == 400
        assert (await server.client.post("/slow_down", {"forward_sleep_time": 1e300})).status == 400


@asynchronous
async def test_what_an_answer_says_of_the_weights_is_known_though_nobody_waits_for_it_any_more() -> None:
    async with served() as server:
        server.ring.push(Reply(id="late", body={"weight_version": "two", "model_path": "/models/two", "paused": True}))
        assert (await server.client.get("/flush_cache")).status == 200  # behind it on the ring
        info = (await server.client.get("/get_model_info")).json()
        assert (info["weight_version"], info["model_path"]) == ("two", "/models/two")
        assert (await server.client.get("/readyz")).status == 503


@asynchronous
async def test_abort_request_answers_200_with_nothing_whatever_is_known() -> None:
    async with served() as server:
        call = server.client.start("POST", "/generate", {"text": ["a", "b"], "rid": "r"})
        await server.ring.sent_of(Generate, 2)
        for body in ({"rid": "unknown"}, {"rid": ""}, {}, None, {"rid": "r"}):
            answer = await server.client.post("/abort_request", body)
            assert (answer.status, answer.body) == (200, b"")
        assert [abort.rid for abort in await server.ring.sent_of(Abort, 2)] == ["r_0", "r_1"]
        end = Finish(reason="abort", message="Aborted")
        server.ring.push(step("r_0", finish=end), step("r_1", finish=end))
        assert [item["meta_info"]["finish_reason"]["type"] for item in (await call.answer()).json()] == ["abort"] * 2


def test_every_command_with_a_path_has_a_route() -> None:
    table = {endpoint.path: endpoint for endpoint in ENDPOINTS}
    for path, command in control.routes().items():
        assert table[path].methods == command.methods
        assert table[path].access is (Access.ADMIN if command.admin else Access.USER)
