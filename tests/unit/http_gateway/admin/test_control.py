"""Control endpoints: one per command."""

import base64
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.http.auth import Access
from quartet.runtime import control
from quartet.runtime.adapters import TENSORS_PATH, Adapter, LoadAdapterFromTensors
from quartet.runtime.control import COMMAND_LOST, Abort, FlushCache
from quartet.runtime.limits import MAX_ADAPTER_BODY_VALUES
from quartet.runtime.messages import Finish, Generate, Reply
from quartet.scheduler_service.control.handlers import FLUSH_FAILED, FLUSH_IN_PROGRESS, FLUSH_TIMED_OUT, FLUSHED
from tests.unit.http_gateway.harness import Answer, Served, asynchronous, served, step, words

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


@asynchronous
async def test_the_path_by_which_vllm_clients_clear_the_prefix_cache() -> None:
    async with served() as server:
        assert (await server.client.post("/reset_prefix_cache")).status == 200
        assert await server.ring.sent_of(FlushCache)


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
        "/load_lora_adapter_from_distributed": {
            "lora_name": "a", "config_dict": {}, "names": [], "dtypes": [], "shapes": []
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
async def test_what_the_gateway_knows_of_the_weights_comes_with_facts_whoever_has_asked_for_the_change() -> None:
    async with served() as server:
        state = {"weight_version": "two", "model_path": "/models/two", "paused": True}
        server.ring.push(msgspec.structs.replace(server.gateway.facts, state=state))
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


# adapters

SQL = Adapter(name="sql", path="/adapters/sql", version="1", rank=8)
TENSORS = b"tensors as safetensors writes them" * 4000  # longer than what stays in a body
BASE64 = base64.b64encode(TENSORS).decode()


def body_of(*adapters: Adapter) -> dict[str, Any]:
    """The body of a scheduler's reply after these adapters have become all."""
    return {
        "loaded_adapters": {adapter.name: adapter.path for adapter in adapters},
        "adapters": [msgspec.to_builtins(adapter) for adapter in adapters],
    }


async def commanded(server: Served, path: str, body: Any, reply: Reply) -> tuple[Any, Answer]:
    """The command that a body becomes, and what is answered when the scheduler replies so."""
    server.ring.answers_commands = False
    kind = control.routes()[path]
    before = len(await server.ring.sent_of(kind, 0))
    call = server.client.start("POST", path, body)
    command = (await server.ring.sent_of(kind, before + 1))[-1]
    server.ring.push(msgspec.structs.replace(server.gateway.facts, state=reply.body or {}))  # as Scheduler.receive
    server.ring.push(msgspec.structs.replace(reply, id=command.id))
    return command, await call.answer()


@asynchronous
async def test_an_adapter_is_loaded_listed_and_unloaded() -> None:
    async with served(enable_lora=True) as server:
        body = {"lora_name": "sql", "lora_path": "/adapters/sql"}
        command, answer = await commanded(server, "/load_lora_adapter", body, Reply(id="", body=body_of(SQL)))
        assert (command.lora_name, command.lora_path, command.pinned, command.load_inplace) == (
            "sql", "/adapters/sql", False, False,
        )  # fmt: skip
        assert (answer.status, answer.json()) == (
            200,
            {"success": True, "error_message": "", "loaded_adapters": {"sql": "/adapters/sql"}},
        )
        assert "sql" in server.gateway.adapters
        reply = Reply(id="", body=body_of())
        command, answer = await commanded(server, "/unload_lora_adapter", {"lora_name": "sql"}, reply)
        assert answer.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
        assert "sql" not in server.gateway.adapters


@asynchronous
async def test_a_refusal_says_why_and_lists_what_is_loaded() -> None:
    async with served(enable_lora=True) as server:
        server.gateway.learn(body_of(SQL))
        reply = Reply(id="", success=False, message="sql is already loaded.")
        body = {"lora_name": "sql", "lora_path": "p", "pinned": True, "lora_id": None}
        command, answer = await commanded(server, "/load_lora_adapter", body, reply)
        assert command.pinned
        assert (answer.status, answer.json()) == (
            400,
            {
                "success": False,
                "error_message": "sql is already loaded.",
                "loaded_adapters": {"sql": "/adapters/sql"},
            },
        )


@pytest.mark.parametrize("tensors", [{"serialized_named_tensors": [BASE64]}, {"serialized_tensors": BASE64}])
@asynchronous
async def test_tensors_reach_the_scheduler_as_a_file_under_either_name(tensors: dict[str, Any], tmp_path: Path) -> None:
    async with served(enable_lora=True) as server:
        server.gateway.run_dir = str(tmp_path)
        server.ring.answers_commands = False
        body = {"lora_name": "policy", "config_dict": {"r": 8, "lora_alpha": 16}, "load_inplace": True, **tensors}
        call = server.client.start("POST", "/load_lora_adapter_from_tensors", body)
        [command] = await server.ring.sent_of(LoadAdapterFromTensors)
        assert (command.lora_name, command.config_dict, command.load_inplace) == (
            "policy", {"r": 8, "lora_alpha": 16}, True,
        )  # fmt: skip
        [file] = command.payload_files
        assert Path(file).read_bytes() == TENSORS
        assert not command.serialized_named_tensors and command.serialized_tensors is None
        policy = Adapter(name="policy", path=TENSORS_PATH, version="2", rank=8)
        server.ring.push(Reply(id=command.id, body=body_of(policy)))
        assert (await call.answer()).json()["loaded_adapters"] == {"policy": "__tensor__"}
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ({"lora_name": "a", "config_dict": {}}, "one entry for each of 1 ranks, got 0"),
        ({"lora_name": "a", "config_dict": {}, "serialized_named_tensors": ["*"]}, "not valid base64"),
        ({"lora_name": "a", "config_dict": {}, "serialized_named_tensors": [7]}, "a list of base64 strings"),
        ({"lora_name": "a", "config_dict": {}, "payload_files": ["/etc/passwd"]}, "got 0"),
        ({"lora_name": "a", "serialized_named_tensors": ["QUJD"]}, "config_dict"),
        ({"lora_name": "", "config_dict": {}, "serialized_named_tensors": ["QUJD"]}, "lora_name"),
    ],
)
@asynchronous
async def test_a_body_that_holds_no_adapter_is_refused_without_the_ring(
    body: dict[str, Any], said: str, tmp_path: Path
) -> None:
    async with served(enable_lora=True) as server:
        server.gateway.run_dir = str(tmp_path)
        answer = await server.client.post("/load_lora_adapter_from_tensors", body)
        assert answer.status == 400 and said in answer.text
        assert await server.ring.sent_of(LoadAdapterFromTensors, 0) == []
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("entries", "said"),
    [
        ([BASE64], ""),
        ([BASE64] * 4, ""),
        (["QUJD"] * 4, ""),
        ([BASE64] * 3, "serialized_named_tensors needs one entry, or one for each of 4 ranks"),
        ([BASE64] * 5, "serialized_named_tensors needs one entry, or one for each of 4 ranks"),
        ([], "serialized_named_tensors needs one entry, or one for each of 4 ranks"),
        ([BASE64, BASE64, "QUJD", BASE64], "serialized_named_tensors: entry 3 is not the same as the first"),
        (["QUJD", "QUJD", "QUJD", "QUJE"], "serialized_named_tensors: entry 4 is not the same as the first"),
    ],
)
@asynchronous
async def test_an_adapter_of_several_ranks_comes_once_or_once_for_each(
    entries: list[str], said: str, tmp_path: Path
) -> None:
    async with served(enable_lora=True, tp_size=4) as server:
        server.gateway.run_dir = str(tmp_path)
        server.ring.answers_commands = False
        body = {"lora_name": "policy", "config_dict": {"r": 8}, "serialized_named_tensors": entries}
        call = server.client.start("POST", "/load_lora_adapter_from_tensors", body)
        if not said:
            [command] = await server.ring.sent_of(LoadAdapterFromTensors)
            assert [Path(file).read_bytes() for file in command.payload_files] == [base64.b64decode(entries[0])]
            server.ring.push(Reply(id=command.id, body=body_of()))
        answer = await call.answer()
        assert (answer.status, said in answer.text) == (400 if said else 200, True)
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("field", ["config_dict", "added_tokens_config"])
@asynchronous
async def test_settings_of_an_adapter_without_end_are_refused_before_they_are_decoded(field: str) -> None:
    many = {f"k{i}": 1 for i in range(MAX_ADAPTER_BODY_VALUES)}
    async with served(enable_lora=True) as server:
        answer = await server.client.post(
            "/load_lora_adapter_from_tensors", {"lora_name": "a", "config_dict": {}, field: many}
        )
        assert answer.status == 413 and f"more than {MAX_ADAPTER_BODY_VALUES} strings" in answer.text


@pytest.mark.parametrize(
    ("path", "body", "field"),
    [
        ("/load_lora_adapter", {"lora_path": "p"}, "lora_name"),
        ("/load_lora_adapter", {"lora_name": "a"}, "lora_path"),
        ("/load_lora_adapter", {"lora_name": "a" * 5000, "lora_path": "p"}, "lora_name"),
        ("/load_lora_adapter", {"lora_name": "a", "lora_path": "p", "pined": True}, "pinned"),
        ("/load_lora_adapter", {"lora_name": "qwen/qwen2.5-0.5b-instruct", "lora_path": "p"}, "the base model"),
        ("/unload_lora_adapter", {}, "lora_name"),
    ],
)
@asynchronous
async def test_a_field_that_is_missing_or_wrong_is_named(path: str, body: dict[str, Any], field: str) -> None:
    async with served(enable_lora=True) as server:
        answer = await server.client.post(path, body)
        assert answer.status == 400 and field in answer.text


# what trainers send: the fields are those of their own code


@asynchronous
async def test_areal_loads_a_version_under_its_own_name_while_generation_pauses_and_asks_for_it() -> None:
    async with served(words("a"), enable_lora=True) as server:
        for version in (1, 2):
            name = f"lora-v{version}"
            adapter = msgspec.structs.replace(SQL, name=name, path=f"/sync/{name}")
            await commanded_plainly(server, "/pause_generation", {})
            body = {"lora_name": name, "lora_path": f"/sync/{name}"}
            _, answer = await commanded(server, "/load_lora_adapter", body, Reply(id="", body=body_of(adapter)))
            assert answer.json()["success"] is True
            await commanded_plainly(server, "/continue_generation", {})
            body = {"input_ids": [1, 2], "stream": False, "return_logprob": True, "lora_path": name}
            answer = await server.client.post("/generate", {**body, "sampling_params": {"max_new_tokens": 1}})
            meta = answer.json()["meta_info"]
            assert (meta["lora_path"], len(meta["output_token_logprobs"])) == (name, 1)
            assert [generate.request.adapter for generate in await server.ring.sent_of(Generate)][-1] == name


@pytest.mark.parametrize(
    "tensors", [{"serialized_named_tensors": [BASE64]}, {"serialized_tensors": BASE64}, {"serialized_tensors": "QUJD"}]
)
@asynchronous
async def test_verl_and_miles_send_an_adapter_anew_after_they_have_unloaded_it(
    tensors: dict[str, Any], tmp_path: Path
) -> None:
    config = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    policy = Adapter(name="policy", path=TENSORS_PATH, version="1", rank=8)
    async with served(words("a"), enable_lora=True) as server:
        server.gateway.run_dir = str(tmp_path)
        load = {"lora_name": "policy", "config_dict": config, "pinned": False, "load_format": None, **tensors}
        for version in ("1", "2"):
            reply = Reply(id="", body=body_of(msgspec.structs.replace(policy, version=version)))
            command, answer = await commanded(server, "/load_lora_adapter_from_tensors", load, reply)
            assert (answer.json()["success"], command.config_dict) == (True, config)
            body = {"text": "x", "rid": f"r{version}", "extra_key": "k", "lora_path": "policy"}
            assert (await server.client.post("/generate", body)).json()["meta_info"]["lora_path"] == "policy"
            _, answer = await commanded(
                server, "/unload_lora_adapter", {"lora_name": "policy"}, Reply(id="", body=body_of())
            )
            assert answer.json() == {"success": True, "error_message": "", "loaded_adapters": {}}
            body["rid"] = "late"
            assert (await server.client.post("/generate", body)).status == 400


async def commanded_plainly(server: Served, path: str, body: Any) -> None:
    """Send a command that is answered by success."""
    kind = control.routes()[path]
    server.ring.answers_commands = False
    before = len(await server.ring.sent_of(kind, 0))
    call = server.client.start("POST", path, body)
    server.ring.push(Reply(id=(await server.ring.sent_of(kind, before + 1))[-1].id))
    assert (await call.answer()).status == 200
