"""What a body may hold besides the fields that are served: nothing misspelt, and no bytes that are not UTF-8."""

import asyncio
import codecs
import threading
from typing import Any

import msgspec
import pytest

from quartet.http_gateway.anthropic.types import MessagesBody
from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.native.generate_body import GenerateBody
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.openai.types import ChatBody, CompletionBody
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import LARGE_BODY
from quartet.runtime.control import ControlCommand, ReleaseMemory, UpdateWeightVersion
from quartet.runtime.errors import RequestError
from quartet.runtime.limits import MAX_NAME_CHARS
from quartet.runtime.messages import Generate
from quartet.runtime.sampling import SamplingParams
from tests.unit.http_gateway.harness import asynchronous, served
from tests.unit.http_gateway.openai_scripts import says

CHAT = {"messages": [{"role": "user", "content": "hi"}]}
# Fields that other servers and clients of these APIs have, as they are found in the wild.
FOREIGN = """
best_of use_beam_search length_penalty include_stop_str_in_output prompt_logprobs allowed_token_ids bad_words
guided_json guided_regex guided_choice guided_grammar request_id return_tokens_as_token_ids kv_transfer_params
vllm_xargs mm_processor_kwargs include_reasoning thinking_token_budget early_stopping token_ids truncate_prompt_tokens
inputs parameters do_sample typical_p top_n_tokens details watermark n_predict n_probs n_keep dynatemp_range
repeat_penalty repeat_last_n dry_base mirostat mirostat_tau tfs_z grammar min_keep id_slot cache_prompt samplers
top_n_sigma reasoning_format enable_thinking format options keep_alive raw images think template system context shift
num_ctx num_predict models route provider transforms plugins usage reasoning top_a preset verbosity random_seed
safe_prompt prefix stop_sequences thinking anthropic_version max_tokens_to_sample texts input_type message connectors
k p max_tokens_per_doc top_n top_h typical min_temp max_temp rep_pen max_length min_length mode character
instruction_template user users seeds tags store metadata service_tier modalities prediction web_search_options
safety_identifier prompt_cache_key functions function_call audio pp_rank api_base extra_body timeout
"""


def misspelt(name: str, kind: type = ChatBody) -> str:
    with pytest.raises(RequestError) as refused:
        bodies.refuse_misspelt([name], kind)
    assert refused.value.field == name
    return refused.value.message


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("max_token", "max_tokens"),
        ("maxTokens", "max_tokens"),
        ("temprature", "temperature"),
        ("strem", "stream"),
        ("top_pp", "top_p"),
        ("tool", "tools"),
        ("respones_format", "response_format"),
        ("Stop", "stop"),
        ("sto", "stop"),
        ("chat_template_kwarg", "chat_template_kwargs"),
    ],
)
def test_a_field_that_is_a_known_one_written_wrongly_is_refused_with_both_names(name: str, meant: str) -> None:
    assert misspelt(name) == f"Unknown field `{name}`: did you mean `{meant}`?"


def test_a_command_is_not_carried_out_on_everything_for_want_of_a_letter() -> None:
    assert misspelt("tag", ReleaseMemory) == "Unknown field `tag`: did you mean `tags`?"


@pytest.mark.parametrize(
    "kind",
    dict.fromkeys(e.body for e in ENDPOINTS if e.body is not None and not issubclass(e.body, ControlCommand)),
)
def test_fields_of_other_servers_are_no_misspellings(kind: type) -> None:
    bodies.refuse_misspelt([name for name in FOREIGN.split() if name not in bodies.names_of(kind)], kind)


@asynchronous
async def test_a_byte_order_mark_before_a_body_is_no_part_of_it() -> None:
    async with served(says("x")) as server:
        for path, body in (("/v1/chat/completions", CHAT), ("/generate", {"text": "a"})):
            answer = await server.client.post(path, codecs.BOM_UTF8 + msgspec.json.encode(body))
            assert answer.status == 200, answer.text
        twice = await server.client.post("/generate", 2 * codecs.BOM_UTF8 + b'{"text": "a"}')
        assert twice.status == 400


@pytest.mark.parametrize("kind", [e.body for e in ENDPOINTS if e.body is not None])
def test_no_known_field_is_a_misspelling_of_another(kind: type) -> None:
    bodies.refuse_misspelt(bodies.names_of(kind), kind)


def test_only_so_many_unknown_fields_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    compared = []
    monkeypatch.setattr(bodies, "is_misspelt", lambda name, own: compared.append(name))
    bodies.refuse_misspelt([f"unknown_{n}" for n in range(10_000)], GenerateBody)
    assert len(set(compared)) == 16


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/generate", {"text": "a", "sampling_param": {}}),
        ("/v1/chat/completions", {**CHAT, "max_token": 3}),
        ("/v1/completions", {"prompt": "a", "max_token": 3}),
        ("/v1/responses", {"input": "a", "max_output_token": 3}),
        ("/tokenize", {"prompt": "a", "add_special_token": False}),
        ("/tokenize", {**CHAT, "chat_template_kwarg": {}}),
        ("/vertex_generate", {"instances": [{"text": "a", "return_logprobs": True}]}),
        ("/abort_request", {"abort_al": True}),
    ],
)
@asynchronous
async def test_a_misspelling_is_a_400_on_every_api(path: str, body: dict[str, Any]) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(path, body)
        assert (answer.status, "did you mean" in answer.text) == (400, True), answer.text


@pytest.mark.parametrize("name", SamplingParams.__struct_fields__)
@asynchronous
async def test_a_sampling_parameter_beside_the_sampling_parameters_is_a_400_that_says_where_it_belongs(
    name: str,
) -> None:
    async with served(says("x")) as server:
        refused = await server.client.post("/generate", {"text": "a", name: 0})
        assert refused.status == 400
        assert (
            refused.json()["error"]["message"] == f"`{name}` stands in the wrong place: put it into `sampling_params`."
        )
        refused = await server.client.post("/vertex_generate", {"instances": [{"text": "a", name: 0}]})
        assert (refused.status, "put it into `parameters`" in refused.text) == (400, True)
        assert (await server.client.post("/generate", {"text": "a", name: None})).status == 200


ROUTES: dict[str, dict[str, Any]] = {
    "/generate": {"text": "a"},
    "/v1/completions": {"prompt": "a"},
    "/v1/chat/completions": CHAT,
    "/v1/responses": {"input": "a"},
    "/v1/messages": {**CHAT, "max_tokens": 5},
}


@pytest.mark.parametrize(
    ("path", "name", "value", "instead"),
    [
        ("/generate", "max_tokens", 5, "use `max_new_tokens` of `sampling_params`"),
        ("/generate", "seed", 0, "use `sampling_seed` of `sampling_params`"),
        ("/generate", "logprobs", 1, "use `return_logprob`"),
        ("/generate", "response_format", {"type": "json_object"}, "use `json_schema` of `sampling_params`"),
        ("/generate", "messages", CHAT["messages"], "conversations go to /v1/chat/completions"),
        ("/v1/completions", "max_new_tokens", 128, "use `max_tokens`"),
        ("/v1/completions", "top_logprobs_num", 2, "use `logprobs`"),
        ("/v1/completions", "sampling_params", {"n": 2}, "put its fields beside `model`, under the names of this API"),
        ("/v1/chat/completions", "max_new_tokens", 5, "use `max_tokens`"),
        ("/v1/chat/completions", "sampling_seed", 5, "use `seed`"),
        ("/v1/chat/completions", "return_logprob", True, "use `logprobs`"),
        ("/v1/chat/completions", "stream_interval", 5, "/generate has it, this endpoint has not"),
        ("/v1/chat/completions", "sampling_params", {"n": 2}, "put its fields beside `model`, under the names of this"),
        ("/v1/chat/completions", "functions", [{"name": "f"}], "use `tools`"),
        ("/v1/chat/completions", "function_call", {"name": "f"}, "use `tool_choice`"),
        ("/v1/responses", "max_tokens", 5, "use `max_output_tokens`"),
        ("/v1/responses", "seed", 5, "/v1/chat/completions has it, this endpoint has not"),
        ("/v1/messages", "max_new_tokens", 6, "use `max_tokens`"),
        ("/v1/messages", "stop", ["x"], "use `stop_sequences`"),
        ("/v1/messages", "min_p", 0.5, "/v1/chat/completions has it, this endpoint has not"),
    ],
)
@asynchronous
async def test_a_field_of_another_api_is_a_400_that_says_what_to_write(
    path: str, name: str, value: Any, instead: str
) -> None:
    async with served(says("x")) as server:
        refused = await server.client.post(path, {**ROUTES[path], name: value})
        assert (refused.status, f"`{name}` is no field of this endpoint: {instead}" in refused.text) == (400, True)
        assert not server.ring.sent
        for nothing in (None, False, "", [], {}):
            assert (await server.client.post(path, {**ROUTES[path], name: nothing})).status == 200, nothing


@pytest.mark.parametrize("path", ["/v1/responses", "/v1/messages"])
@asynchronous
async def test_a_parameter_that_an_api_lacks_may_have_its_default(path: str) -> None:
    async with served(says("x")) as server:
        spelt_out = {"n": 1, "frequency_penalty": 0, "repetition_penalty": 1.0, "ignore_eos": False}
        assert (await server.client.post(path, {**ROUTES[path], **spelt_out})).status == 200


@asynchronous
async def test_a_limit_under_two_names_is_one_limit() -> None:
    async with served(says("x")) as server:
        measured = {"prompt": "a", "max_tokens": 5, "stop": None, "ignore_eos": True}
        assert (await server.client.post("/v1/completions", {**measured, "max_completion_tokens": 5})).status == 200
        [generate] = await server.ring.sent_of(Generate)
        assert generate.request.params.max_new_tokens == 5
        refused = await server.client.post("/v1/completions", {**measured, "max_completion_tokens": 6})
        assert (refused.status, refused.json()["param"]) == (400, "max_completion_tokens")


@asynchronous
async def test_outputs_of_one_length_for_clients_of_responses_that_measure() -> None:
    async with served(says("x")) as server:
        body = {"input": "a", "max_output_tokens": 5, "min_tokens": 4, "stop": None, "ignore_eos": True}
        assert (await server.client.post("/v1/responses", body)).status == 200
        [generate] = await server.ring.sent_of(Generate)
        params = generate.request.params
        assert (params.max_new_tokens, params.min_new_tokens, params.ignore_eos) == (5, 4, True)


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
@asynchronous
async def test_what_openai_endpoints_have_beyond_openai_stays(path: str) -> None:
    extensions = {
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "regex": "a+",
        "min_tokens": 1,
        "ignore_eos": True,
    }
    async with served(says("x")) as server:
        assert (await server.client.post(path, {**ROUTES[path], **extensions})).status == 200


@asynchronous
async def test_an_instance_with_a_field_of_another_api_is_refused() -> None:
    async with served(says("x")) as server:
        refused = await server.client.post("/vertex_generate", {"instances": [{"text": "a"}, {"text": "a", "seed": 1}]})
        assert (refused.status, "use `sampling_seed` of `sampling_params`" in refused.text) == (400, True)


@pytest.mark.parametrize("path", ["/generate", "/v1/chat/completions"])
@asynchronous
async def test_a_compressed_body_is_refused_by_the_name_of_its_header(path: str) -> None:
    async with served(says("x")) as server:
        headers = {"content-type": "application/json", "content-encoding": "gzip"}
        answer = await server.client.post(path, b"{}", headers=headers)
        assert (answer.status, "Content-Encoding: 'gzip' is not supported" in answer.text) == (400, True)


@pytest.mark.parametrize("path", ["/generate", "/v1/completions"])
@asynchronous
async def test_what_is_foreign_is_ignored(path: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(
            path, {"text": "a", "prompt": "a", "top_n": 3, "guided_json": {}, "seeds": [1]}
        )
        assert answer.status == 200, answer.text


@pytest.mark.parametrize("kind", [GenerateBody, CompletionBody])
def test_bytes_that_are_no_text_are_refused_in_unknown_fields_too(kind: type) -> None:
    with pytest.raises(UnicodeDecodeError):
        bodies.decode_json_body(b'{"prompt": "a", "text": "a", "whatever": "\xff"}', kind)


@asynchronous
async def test_bytes_that_are_no_text_are_a_400() -> None:
    async with served(says("x")) as server:
        answer = await server.client.post("/generate", b'{"text": "a", "whatever": "\xff"}')
        assert answer.status == 400 and "Invalid request body" in answer.text


def test_a_body_that_is_no_object_is_refused_as_before() -> None:
    with pytest.raises(msgspec.ValidationError, match="Expected `object`"):
        bodies.decode_json_body(b"[1]", GenerateBody)


@pytest.mark.parametrize(
    ("kind", "fields", "name"),
    [
        (ChatBody, CHAT, "model"),
        (ChatBody, CHAT, "user"),
        (CompletionBody, {"prompt": "hi"}, "model"),
        (ResponsesBody, {"input": "hi"}, "model"),
        (ResponsesBody, {"input": "hi"}, "user"),
        (MessagesBody, {"messages": [], "max_tokens": 1}, "model"),
        (UpdateWeightVersion, {}, "new_version"),
    ],
)
def test_names_that_come_back_in_answers_have_a_bound(kind, fields, name):
    assert getattr(msgspec.convert(fields | {name: "x" * MAX_NAME_CHARS}, kind), name)
    with pytest.raises(msgspec.ValidationError, match=rf"length <= {MAX_NAME_CHARS} - at `\$\.{name}`"):
        msgspec.convert(fields | {name: "x" * (MAX_NAME_CHARS + 1)}, kind)


def test_weights_have_a_version():
    with pytest.raises(msgspec.ValidationError, match=r"length >= 1 - at `\$\.new_version`"):
        msgspec.convert({"new_version": ""}, UpdateWeightVersion)


LARGE_BODIES = {
    "/generate": ("text", {}),
    "/v1/completions": ("prompt", {}),
    "/v1/chat/completions": ("chat_template", {"messages": [{"role": "user", "content": "a"}]}),
    "/v1/messages": ("system", {"messages": [{"role": "user", "content": "a"}], "max_tokens": 1}),
    "/v1/responses": ("input", {}),
    "/tokenize": ("prompt", {}),
    "/v1/tokenize": ("name", {"messages": [{"role": "user", "content": "a"}]}),
    "/abort_request": ("rid", {}),
    "/update_weight_version": ("new_version", {}),
    "/load_lora_adapter": ("lora_path", {"lora_name": "a"}),
}


@pytest.mark.parametrize("path", LARGE_BODIES)
@asynchronous
async def test_a_large_body_is_decoded_beside_the_event_loop(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A decoder keeps the interpreter for its whole call; in a thread, others run between two of its calls."""
    field, others = LARGE_BODIES[path]
    decode, gone = msgspec.json.decode, asyncio.Event()
    threads: list[int] = []

    def noting(raw: bytes, **options: Any) -> Any:
        if len(raw) >= LARGE_BODY:
            threads.append(threading.get_ident())
        return decode(raw, **options)

    async with served() as server:
        monkeypatch.setattr(msgspec.json, "decode", noting)
        call = server.client.start("POST", path, {field: "a" * LARGE_BODY} | others, gone=gone)
        while not threads:
            await asyncio.sleep(0.001)
        gone.set()
        await call.answer()
    assert threading.get_ident() not in threads


@pytest.mark.parametrize("value", ["auto", "none", None])
def test_the_choice_of_no_functions_asks_for_nothing(value: Any) -> None:
    bodies.refuse_other_names({"function_call": value, "functions": []}, ChatBody)
