"""What the server says about itself."""

import asyncio

import pytest

from quartet.runtime.control import Probe
from tests.unit.http_gateway.harness import asynchronous, served, words

MODEL = "qwen/qwen2.5-0.5b-instruct"


@asynchronous
async def test_model_info_has_exactly_the_five_keys() -> None:
    async with served(preferred_sampling_params='{"temperature": 0.7}') as server:
        assert (await server.client.get("/get_model_info")).json() == {
            "model_path": MODEL,
            "tokenizer_path": MODEL,
            "is_generation": True,
            "preferred_sampling_params": '{"temperature": 0.7}',
            "weight_version": "default",
        }
        more = (await server.client.get("/model_info")).json()
        assert more["architectures"] == ["Qwen2ForCausalLM"] and more["served_model_name"] == MODEL


@pytest.mark.parametrize("path", ["/server_info", "/get_server_info"])
@asynchronous
async def test_server_info_has_settings_facts_and_counters_and_no_keys(path: str) -> None:
    async with served(api_key="secret-u", admin_api_key="secret-a", max_running_requests=9) as server:
        answer = await server.client.get(path, headers={"authorization": "Bearer secret-u"})
        body = answer.json()
        assert (body["status"], body["max_total_num_tokens"], body["max_req_input_len"]) == ("ready", 128, 120)
        assert (body["model_path"], body["tp_size"], body["max_running_requests"]) == (MODEL, 1, 9)
        assert body["internal_states"][0]["last_gen_throughput"] == 12.5
        assert "secret" not in answer.text


@asynchronous
async def test_server_info_is_there_while_the_ring_says_nothing() -> None:
    async with served() as server:
        assert (await server.client.get("/get_server_info")).json()["unanswered_dp_ranks"] == []
        server.ring.answers_commands = False
        await server.gateway.counters.read(0, 0.01)
        body = (await server.client.get("/get_server_info")).json()
        assert body["unanswered_dp_ranks"] == [0] and body["status"] == "ready"
        assert body["internal_states"][0]["last_gen_throughput"] == 12.5, "as it last said"


@asynchronous
async def test_models_are_listed_and_found_by_names_with_slashes() -> None:
    async with served() as server:
        [card] = (await server.client.get("/v1/models")).json()["data"]
        assert (card["id"], card["root"], card["owned_by"], card["max_model_len"]) == (MODEL, MODEL, "quartet", 512)
        assert (await server.client.get(f"/v1/models/{MODEL}")).json() == card
        missing = await server.client.get("/v1/models/nope")
        assert missing.status == 404
        assert missing.json()["error"] == {
            "message": "The model 'nope' does not exist",
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }


@pytest.mark.parametrize("name", [None, "mine"])
@asynchronous
async def test_a_file_is_found_by_its_path_its_file_name_and_its_given_name(name: str | None) -> None:
    async with served(served_model_name=name) as server:
        server.gateway.model_path = path = "models/q4/tiny.gguf"
        [card] = (await server.client.get("/v1/models")).json()["data"]
        assert card["id"] == (name or path)
        for asked in (name or path, path, "tiny.gguf"):
            assert (await server.client.get(f"/v1/models/{asked}")).json() == card
        assert (await server.client.get("/v1/models/q4/tiny.gguf")).status == 404


@asynchronous
async def test_loads_come_in_sections() -> None:
    async with served() as server:
        [core] = (await server.client.get("/v1/loads")).json()["loads"]
        assert (core["num_running_reqs"], core["num_waiting_reqs"], core["max_total_num_tokens"]) == (2, 1, 128)
        assert "memory" not in core
        [every] = (await server.client.get("/v1/loads?include=all")).json()["loads"]
        assert every["memory"]["token_capacity"] == 128
        assert (await server.client.get("/v1/loads?include=nope")).status == 400
        assert (await server.client.get("/v1/loads?dp_rank=1")).json()["loads"] == []
        text = (await server.client.get("/v1/loads?format=prometheus")).text
        assert 'sglang:num_running_reqs{dp_rank="0"} 2\n' in text
        [rank] = (await server.client.get("/get_load")).json()
        assert (rank["dp_rank"], rank["num_reqs"], rank["num_waiting_reqs"], rank["num_tokens"]) == (0, 3, 1, 64)


@asynchronous
async def test_server_information_has_the_numbers_of_one_ring() -> None:
    async with served() as server:
        said = (await server.client.get("/get_server_info")).json()
        wanted = {"nnodes": 1, "node_rank": 0, "gpu_id_step": 1, "base_gpu_id": 0, "ep_size": 1, "tp_size": 1}
        assert {name: said[name] for name in wanted} == wanted


@asynchronous
async def test_readers_at_the_same_time_share_one_probe() -> None:
    async with served() as server:
        await asyncio.gather(*(server.client.get("/v1/loads") for _ in range(10)))
        assert len(await server.ring.sent_of(Probe)) == 1


@asynchronous
async def test_metrics_have_the_names_that_dashboards_know() -> None:
    async with served(words("a", "b")) as server:
        await server.client.post("/generate", {"text": "hi"})
        await server.client.post("/generate", {"text": "hi", "log_metrics": False})
        text = (await server.client.get("/metrics")).text
        label = f'{{model_name="{MODEL}"}}'
        assert f"sglang:num_requests_total{label} 1.0" in text
        assert f"sglang:prompt_tokens_total{label} 3.0" in text
        assert f"sglang:generation_tokens_total{label} 2.0" in text
        assert f"sglang:time_to_first_token_seconds_count{label} 1.0" in text
        assert f"sglang:inter_token_latency_seconds_count{label} 1.0" in text
        assert f"sglang:e2e_request_latency_seconds_count{label} 1.0" in text
        assert "sglang:num_running_reqs{" in text and "sglang:token_usage{" in text
        assert 'sglang:http_responses_total{endpoint="/generate",method="POST",status_code="200"} 2.0' in text
        assert text.count("# TYPE sglang:prompt_tokens_total ") == 1


@asynchronous
async def test_metrics_are_not_served_where_they_are_off() -> None:
    async with served(enable_metrics=False) as server:
        assert (await server.client.get("/metrics")).status == 404
