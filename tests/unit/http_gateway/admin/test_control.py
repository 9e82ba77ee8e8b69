"""Control endpoints: one per command."""

from pathlib import Path

import msgspec
import pytest

from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.http.auth import Access
from quartet.runtime import control
from quartet.runtime.control import COMMAND_LOST, Abort, FlushCache
from quartet.runtime.messages import Finish, Generate, Reply
from quartet.scheduler_service.control.handlers import FLUSH_FAILED, FLUSH_IN_PROGRESS, FLUSH_TIMED_OUT, FLUSHED
from tests.unit.http_gateway.harness import asynchronous, served, step

FLUSH_TEXTS = [
    (Reply(id="", message=FLUSHED), 200),
    (Reply(id="", success=False, message=FLUSH_FAILED, status=400), 400),
    (Reply(id="", success=False, message=FLUSH_TIMED_OUT, status=400), 400),
    (Reply(id="", success=False, message=FLUSH_IN_PROGRESS, status=400), 400),
    (Reply(id="", success=False, message=COMMAND_LOST, status=503), 503),
]


@pytest.mark.parametrize("method", ["GET", "POST"])
@pytest.mark.parametrize(("reply", "status"), FLUSH_TEXTS)
@asynchronous
async def test_flush_cache_answers_exactly_the_message_of_the_scheduler(method: str, reply: Reply, status: int) -> None:
    async with served() as server:
        server.ring.answers_commands = False
        call = server.client.start(method, "/flush_cache?timeout=2.5")
        [command] = await server.ring.sent_of(FlushCache)
        assert command.timeout == 2.5
        server.ring.push(msgspec.structs.replace(reply, id=command.id))
        answer = await call.answer()
        assert (answer.status, answer.text) == (status, reply.message)


@pytest.mark.parametrize("path", [path for path, command in control.routes().items() if command is not Abort])
@asynchronous
async def test_every_command_reports_a_refusal_once(path: str, tmp_path: Path) -> None:
    bodies: dict[str, dict[str, object]] = {
        "/update_weights_from_disk": {"model_path": "m"},
        "/update_weights": {"model_path": "m"},
        "/init_weights_update_group": {
            "master_address": "a", "master_port": 1, "rank_offset": 1, "world_size": 2
        },
        "/update_weights_from_distributed": {"names": [], "dtypes": [], "shapes": []},
        "/update_weight_version": {"new_version": "v"},
        "/update_weights_from_tensor": {"serialized_named_tensors": ["QUJD"]},
        "/get_weights_by_name": {"name": "w"},
        "/load_lora_adapter": {"lora_name": "a", "lora_path": "p"},
        "/load_lora_adapter_from_tensors": {
            "lora_name": "a", "config_dict": {}, "serialized_named_tensors": ["QUJD"]
        },
        "/unload_lora_adapter": {"lora_name": "a"},
    }  # fmt: skip
    async with served(enable_lora=True) as server:
        server.gateway.run_dir = str(tmp_path)
        server.ring.answers_commands = False
        call = server.client.start("POST", path, bodies.get(path, {}))
        [command] = await server.ring.sent_of(control.routes()[path])
        server.ring.push(Reply(id=command.id, success=False, message="It cannot be done", status=409))
        answer = await call.answer()
        assert answer.status >= 400 and answer.text.count("It cannot be done") == 1


@asynchronous
async def test_an_invalid_value_is_refused_by_the_name_of_its_field() -> None:
    async with served() as server:
        answer = await server.client.get("/flush_cache?timeout=soon")
        assert (answer.status, answer.json()["success"]) == (400, False)
        assert "timeout" in answer.json()["message"]
        assert (await server.client.post("/flush_cache", {"timeout": "soon"})).status == 400
        assert (await server.client.get("/flush_cache?timeout=nan")).status == 400
        assert (await server.client.post("/flush_cache", {"timeout": -1})).status == 400
        assert (await server.client.post("/slow_down", {"forward_sleep_time": 1e300})).status == 400


@asynchronous
async def test_a_late_reply_still_updates_what_the_gateway_knows_of_the_weights() -> None:
    async with served() as server:
        server.ring.push(Reply(id="late", body={"weight_version": "two", "model_path": "/models/two", "paused": True}))
        assert (await server.client.get("/flush_cache")).status == 200  # behind it on the ring
        info = (await server.client.get("/get_model_info")).json()
        assert (info["weight_version"], info["model_path"]) == ("two", "/models/two")
        assert (await server.client.get("/readyz")).status == 503


@asynchronous
async def test_abort_request_answers_200_and_an_empty_body_for_known_and_unknown_rids() -> None:
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
