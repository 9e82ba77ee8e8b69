"""LoRA adapters at the gateway: who may be named, by which fields, and what answers and lists say of them."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.generation.adapters import Adapters
from quartet.runtime.adapters import Adapter
from quartet.runtime.errors import RequestError
from quartet.runtime.limits import MAX_ADAPTER_LABELS
from quartet.runtime.messages import Finish, Generate, Message
from tests.unit.http_gateway.harness import Served, asynchronous, served, step, words

SQL = Adapter(name="sql", path="/adapters/sql", version="1", rank=8)
CHAT = Adapter(name="chat", path="owner/chat", version="1", rank=16, pinned=True, loaded=False)
BASE = "qwen/qwen2.5-0.5b-instruct"


def told(*adapters: Adapter) -> dict[str, Any]:
    """The body of a scheduler's reply after these adapters have become all."""
    return {
        "loaded_adapters": {adapter.name: adapter.path for adapter in adapters},
        "adapters": [msgspec.to_builtins(adapter) for adapter in adapters],
    }


@asynccontextmanager
async def serving(*adapters: Adapter, script: Any = None, **settings: Any) -> AsyncIterator[Served]:
    async with served(script or words("a"), enable_lora=True, **settings) as server:
        server.gateway.learn(told(*adapters))
        yield server


async def adapters_asked(server: Served, path: str, body: dict[str, Any]) -> list[str]:
    """The adapters of the requests that a body makes."""
    before = len(await server.ring.sent_of(Generate, 0))
    answer = await server.client.post(path, body)
    assert answer.status == 200, answer.text
    return [generate.request.adapter for generate in (await server.ring.sent_of(Generate, 0))[before:]]


@pytest.mark.parametrize(
    ("body", "asked"),
    [
        ({"text": "x"}, [""]),
        ({"text": "x", "lora_path": None}, [""]),
        ({"text": "x", "lora_path": "sql"}, ["sql"]),
        ({"text": ["x", "y"], "lora_path": "sql"}, ["sql", "sql"]),
        ({"text": ["x", "y", "z"], "lora_path": ["sql", None, "chat"]}, ["sql", "", "chat"]),
        ({"input_ids": [[1], [2]], "lora_path": [None, "sql"]}, ["", "sql"]),
    ],
)
@asynchronous
async def test_each_prompt_of_generate_may_name_an_adapter(body: dict[str, Any], asked: list[str]) -> None:
    async with serving(SQL, CHAT) as server:
        assert await adapters_asked(server, "/generate", body) == asked


@asynchronous
async def test_the_warming_request_of_copies_uses_the_adapter_of_its_prompt() -> None:
    async with serving(SQL) as server:
        body = {"text": "x", "lora_path": "sql", "sampling_params": {"n": 2}}
        assert await adapters_asked(server, "/generate", body) == ["sql", "sql", "sql"]


@pytest.mark.parametrize(
    ("fields", "adapter"),
    [
        ({"model": "sql"}, "sql"),
        ({"model": f"{BASE}:sql"}, "sql"),
        ({"model": "any-name:chat"}, "chat"),
        ({"model": BASE}, ""),
        ({"model": "gpt-4"}, ""),
        ({"model": "default"}, ""),
        ({}, ""),
        ({"model": "sql", "lora_path": "chat"}, "chat"),
        ({"model": BASE, "lora_path": "chat"}, "chat"),
    ],
)
@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "x"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]}),
    ],
)
@asynchronous
async def test_openai_bodies_name_an_adapter_by_model_or_lora_path(
    path: str, body: dict[str, Any], fields: dict[str, Any], adapter: str
) -> None:
    async with serving(SQL, CHAT) as server:
        assert await adapters_asked(server, path, {**body, **fields}) == [adapter]


@asynchronous
async def test_the_other_apis_name_an_adapter_by_their_model() -> None:
    async with serving(SQL) as server:
        message = {"max_tokens": 4, "messages": [{"role": "user", "content": "x"}]}
        assert await adapters_asked(server, "/v1/messages", {"model": "sql", **message}) == ["sql"]
        assert await adapters_asked(server, "/v1/responses", {"model": "sql", "input": "x"}) == ["sql"]


@asynchronous
async def test_prompts_of_a_completion_may_have_adapters_of_their_own() -> None:
    async with serving(SQL, CHAT) as server:
        body = {"prompt": ["x", "y"], "lora_path": ["sql", None]}
        assert await adapters_asked(server, "/v1/completions", body) == ["sql", ""]
        answer = await server.client.post("/v1/completions", {"prompt": "x", "lora_path": ["sql"]})
        assert (answer.status, answer.headers["x-error-field"]) == (400, "lora_path")


@asynchronous
async def test_a_served_name_with_a_colon_is_the_base() -> None:
    async with serving(SQL, served_model_name="owner/model:Q4_K_M") as server:
        chat = {"messages": [{"role": "user", "content": "x"}]}
        assert await adapters_asked(server, "/v1/chat/completions", {**chat, "model": "owner/model:Q4_K_M"}) == [""]
        assert await adapters_asked(server, "/v1/chat/completions", {**chat, "model": "owner/model:Q4_K_M:sql"}) == [
            "sql"
        ]


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "x", "lora_path": "nosuch"}),
        ("/generate", {"text": ["x", "y"], "lora_path": ["sql", "nosuch"]}),
        ("/v1/completions", {"prompt": "x", "lora_path": "nosuch"}),
        ("/v1/completions", {"prompt": "x", "model": f"{BASE}:nosuch"}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "model": "m:nosuch"}),
    ],
)
@asynchronous
async def test_an_unknown_adapter_is_a_400_that_lists_the_known_ones(path: str, body: dict[str, Any]) -> None:
    async with serving(SQL) as server:
        answer = await server.client.post(path, body)
        assert answer.status == 400
        assert "Got LoRA adapter that has never been loaded: nosuch. All loaded adapters: sql." in answer.text
        assert answer.headers["x-error-field"] == "lora_path"
        assert await server.ring.sent_of(Generate, 0) == []


@pytest.mark.parametrize(
    ("lora_path", "said"),
    [
        (["sql"], "lora_path has 1 items for a batch of 2"),
        (7, "lora_path"),
        ([7, None], "lora_path"),
        ({"a": 1}, "lora_path"),
    ],
)
@asynchronous
async def test_a_lora_path_of_the_wrong_shape_is_a_400_that_names_it(lora_path: Any, said: str) -> None:
    async with serving(SQL) as server:
        answer = await server.client.post("/generate", {"text": ["x", "y"], "lora_path": lora_path})
        assert answer.status == 400 and said in answer.text


@asynchronous
async def test_without_lora_an_adapter_is_refused_and_a_model_with_a_colon_is_not() -> None:
    async with served(words("a")) as server:
        answer = await server.client.post("/generate", {"text": "x", "lora_path": "sql"})
        assert answer.status == 400 and "--enable-lora" in answer.text
        assert await adapters_asked(server, "/v1/completions", {"prompt": "x", "model": "qwen:7b"}) == [""]
        for command in ("/load_lora_adapter", "/load_lora_adapter_from_tensors", "/unload_lora_adapter"):
            body = {"lora_name": "a", "lora_path": "p", "config_dict": {}, "serialized_named_tensors": ["QUJD"]}
            answer = await server.client.post(command, body)
            assert answer.status == 400 and "--enable-lora" in answer.json()["error_message"]


@asynchronous
async def test_an_adapter_that_was_unloaded_is_not_taken_for_a_name_of_the_base() -> None:
    async with serving(SQL) as server:
        server.gateway.learn(told())
        answer = await server.client.post("/v1/completions", {"prompt": "x", "model": "sql"})
        assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")
        server.gateway.learn(told(SQL))
        assert await adapters_asked(server, "/v1/completions", {"prompt": "x", "model": "sql"}) == ["sql"]


def test_few_names_of_unloaded_adapters_are_remembered() -> None:
    adapters = Adapters(enabled=True)
    for number in range(3000):
        adapters.learn([msgspec.structs.replace(SQL, name=f"a{number}")])
    assert adapters.of_model("a0", ()) == ""
    with pytest.raises(RequestError, match="does not exist"):
        adapters.of_model("a2998", ())


@asynchronous
async def test_the_model_list_has_the_adapters_behind_their_parent() -> None:
    async with serving(SQL, CHAT) as server:
        base, sql, chat = (await server.client.get("/v1/models")).json()["data"]
        assert (base["id"], base["parent"]) == (BASE, None)
        assert (sql["id"], sql["root"], sql["parent"]) == ("sql", "/adapters/sql", BASE)
        assert (chat["id"], chat["root"], chat["parent"]) == ("chat", "owner/chat", BASE)
        assert (await server.client.get("/v1/models/sql")).json() == sql
        assert (await server.client.get("/v1/models/nosuch")).status == 404
        version = {"anthropic-version": "2023-06-01"}
        listed = (await server.client.get("/v1/models", headers=version)).json()
        assert [card["id"] for card in listed["data"]] == [BASE, "sql", "chat"]
        assert (await server.client.get("/v1/models/chat", headers=version)).json()["id"] == "chat"


@asynchronous
async def test_the_servers_own_words_tell_of_the_adapters() -> None:
    async with serving(SQL, CHAT) as server:
        info = (await server.client.get("/get_server_info")).json()
        assert [(a["name"], a["rank"], a["loaded"]) for a in info["lora_adapters"]] == [
            ("sql", 8, True),
            ("chat", 16, False),
        ]
        assert info["enable_lora"] is True
        assert [a["name"] for a in (await server.client.get("/model_info")).json()["lora_adapters"]] == ["sql", "chat"]
        load = (await server.client.get("/v1/loads?include=lora")).json()["loads"][0]
        assert load["lora"] == {"adapters": 2, "loaded": 1}


@asynchronous
async def test_an_answer_tells_the_adapter_and_which_version_made_which_tokens() -> None:
    def script(generate: Generate) -> list[Message]:
        rid = generate.request.rid
        return [
            step(rid, [1, 2], "ab", prompt_tokens=3, adapter_version="1"),
            step(rid, [3], "c", adapter_version="2", finish=Finish(reason="length", length=3)),
        ]

    async with serving(SQL, script=script) as server:
        meta = (await server.client.post("/generate", {"text": "x", "lora_path": "sql"})).json()["meta_info"]
        assert (meta["lora_path"], meta["adapter_version"], meta["weight_version"]) == ("sql", "2", "v1")
        assert meta["weight_versions"] == [
            {"version": "v1", "start": 0, "end": 2, "adapter_version": "1"},
            {"version": "v1", "start": 2, "end": 3, "adapter_version": "2"},
        ]


@asynchronous
async def test_an_answer_of_the_base_says_nothing_of_adapters() -> None:
    async with serving(SQL) as server:
        meta = (await server.client.post("/generate", {"text": "x"})).json()["meta_info"]
        assert not {"lora_path", "adapter_version"} & meta.keys()
        assert meta["weight_versions"] == [{"version": "v1", "start": 0, "end": 1}]


@asynchronous
async def test_requests_are_counted_by_adapter_under_a_bounded_number_of_labels() -> None:
    many = [msgspec.structs.replace(SQL, name=f"a{number}") for number in range(MAX_ADAPTER_LABELS + 3)]
    async with serving(*many) as server:
        for adapter in [*many, many[0]]:
            await server.client.post("/generate", {"text": "x", "lora_path": adapter.name})
        await server.client.post("/generate", {"text": "x"})
        lines = (await server.client.get("/metrics")).text.splitlines()
        samples = [line for line in lines if line.startswith("quartet:adapter_requests_total{")]
        counted = {line.split('lora_name="')[1].split('"')[0]: line.split()[-1] for line in samples}
        assert len(counted) == MAX_ADAPTER_LABELS + 1
        assert (counted["a0"], counted["(others)"]) == ("2.0", "3.0")
