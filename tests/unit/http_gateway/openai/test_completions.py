"""/v1/completions from the client's side, on a ring that answers in process."""

import asyncio
from typing import Any

import pytest

from quartet.runtime.control import Abort, Detokenize
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Finish, Generate, Reply, unpack_ids
from tests.unit.http_gateway.harness import asynchronous, ends, served, step
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/completions"


@asynchronous
async def test_the_whole_answer() -> None:
    async with served(says("Par", "is.")) as server:
        answer = await server.client.post(PATH, {"model": "any", "prompt": "hi", "rid": "r"})
        body = answer.json()
        assert answer.status == 200 and isinstance(body.pop("created"), int)
        assert body == {
            "id": "r",
            "object": "text_completion",
            "model": "any",
            "choices": [{"index": 0, "text": "Paris.", "logprobs": None, "finish_reason": "stop", "matched_stop": 2}],
            "usage": {
                "prompt_tokens": 3,
                "total_tokens": 5,
                "completion_tokens": 2,
                "prompt_tokens_details": None,
                "reasoning_tokens": 0,
            },
            "metadata": {"weight_version": "v1"},
        }


@asynchronous
async def test_the_id_is_the_rid_of_the_request() -> None:
    async with served(says("x")) as server:
        body = (await server.client.post(PATH, {"prompt": "hi"})).json()
        [generate] = await server.ring.sent_of(Generate)
        assert body["id"] == generate.request.rid and len(body["id"]) == 32
        assert body["model"] == "default"


@pytest.mark.parametrize(
    ("prompt", "sent"),
    [
        ("a", ["a"]),
        (["a", "b"], ["a", "b"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
    ],
)
@asynchronous
async def test_all_forms_of_a_prompt(prompt: Any, sent: list[Any]) -> None:
    async with served(says("x")) as server:
        body = (await server.client.post(PATH, {"prompt": prompt})).json()
        generates = await server.ring.sent_of(Generate, len(sent))
        assert [g.text if g.text is not None else unpack_ids(g.input_ids).tolist() for g in generates] == sent
        assert [choice["index"] for choice in body["choices"]] == list(range(len(sent)))


@asynchronous
async def test_choices_stand_by_prompt_and_each_prompt_counts_once() -> None:
    async with served(says("x", "y")) as server:
        body = (await server.client.post(PATH, {"prompt": ["a", "b"], "n": 3})).json()
        texts = [g.text for g in server.ring.sent if isinstance(g, Generate) and g.request.params.max_new_tokens]
        assert texts == ["a", "a", "a", "b", "b", "b"]
        assert [choice["index"] for choice in body["choices"]] == list(range(6))
        assert (body["usage"]["prompt_tokens"], body["usage"]["completion_tokens"]) == (6, 12)


@asynchronous
async def test_a_stream_tells_deltas_and_the_reason_with_the_last() -> None:
    async with served(says("Par", "is.")) as server:
        answer = await server.client.post(PATH, {"prompt": "hi", "stream": True})
        chunks = answer.events()
        assert [chunk["choices"][0]["text"] for chunk in chunks] in (["Paris."], ["Par", "is."])
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "Paris."
        assert chunks[-1]["choices"][0]["finish_reason"] == "stop"
        assert all(chunk["usage"] is None and chunk["object"] == "text_completion" for chunk in chunks)


@asynchronous
async def test_each_step_is_a_chunk_of_its_own() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {"prompt": "hi", "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "a", prompt_tokens=3))
        assert b'"text":"a"' in await call.chunk()
        server.ring.push(step("r", [2], ""))  # held back: it may become a stop
        server.ring.push(step("r", [3], "b", finish=Finish(reason="length", length=3)))
        chunks = (await call.answer()).events()
        assert [chunk["choices"][0]["text"] for chunk in chunks] == ["a", "b"]
        assert chunks[-1]["choices"][0]["finish_reason"] == "length"


@asynchronous
async def test_the_stream_s_usage_comes_in_a_last_chunk_without_choices() -> None:
    async with served(says("a", "b")) as server:
        body = {"prompt": "hi", "stream": True, "stream_options": {"include_usage": True}}
        *others, last = (await server.client.post(PATH, body)).events()
        assert last["choices"] == [] and last["usage"]["total_tokens"] == 5
        assert all(chunk["usage"] is None for chunk in others)
        body["stream_options"] = {"continuous_usage_stats": True}
        assert all(chunk["usage"] for chunk in (await server.client.post(PATH, body)).events())


@asynchronous
async def test_the_cache_is_reported_where_the_operator_wants_it() -> None:
    for wanted, told in ((True, {"cached_tokens": 2}), (False, None)):
        async with served(says("x", cached_tokens=2), enable_cache_report=wanted) as server:
            body = (await server.client.post(PATH, {"prompt": "hi"})).json()
            assert body["usage"]["prompt_tokens_details"] == told


# logprobs and echo


@asynchronous
async def test_logprobs_of_the_output() -> None:
    async with served(says("a", "b")) as server:
        body = (await server.client.post(PATH, {"prompt": "hi", "logprobs": 2})).json()
        assert body["choices"][0]["logprobs"] == {
            "text_offset": [0, 3],
            "token_logprobs": [-0.5, -0.5],
            "tokens": ["t10", "t11"],
            "top_logprobs": [{"t10": -0.5, "t11": -0.5}, {"t11": -0.5, "t12": -0.5}],
        }


@pytest.mark.parametrize("logprobs", [0, True])
@asynchronous
async def test_logprobs_of_the_tokens_alone(logprobs: Any) -> None:
    async with served(says("a")) as server:
        body = (await server.client.post(PATH, {"prompt": "hi", "logprobs": logprobs})).json()
        assert body["choices"][0]["logprobs"]["token_logprobs"] == [-0.5]


@asynchronous
async def test_an_echo_scores_the_prompt_and_stands_before_the_output() -> None:
    async with served(says("b")) as server:
        body = (await server.client.post(PATH, {"prompt": "a", "echo": True, "logprobs": 1})).json()
        [choice] = body["choices"]
        assert choice["text"] == "ab"
        assert choice["logprobs"]["token_logprobs"] == [None, -0.5, -0.5, -0.5]
        assert choice["logprobs"]["top_logprobs"][0] is None
        assert len(choice["logprobs"]["tokens"]) == 4


@asynchronous
async def test_an_echo_of_no_tokens_scores_the_prompt_alone() -> None:
    async with served(says("never")) as server:
        body = (await server.client.post(PATH, {"prompt": "a", "echo": True, "logprobs": 1, "max_tokens": 0})).json()
        assert body["choices"][0]["text"] == "a"
        assert len(body["choices"][0]["logprobs"]["tokens"]) == 3


@asynchronous
async def test_an_echo_of_token_ids_is_their_text() -> None:
    async with served(says("!")) as server:
        server.ring.answers_commands = False
        call = asyncio.create_task(server.client.post(PATH, {"prompt": [5, 6], "echo": True, "stream": True}))
        [command] = await server.ring.sent_of(Detokenize)
        assert unpack_ids(command.ids[0]).tolist() == [5, 6]
        server.ring.push(Reply(id=command.id, body={"texts": ["five six"]}))
        chunks = (await call).events()
        assert "".join(chunk["choices"][0]["text"] for chunk in chunks) == "five six!"


# refusals


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"prompt": ""}, "Prompt cannot be empty"),
        ({"prompt": []}, "Prompt cannot be empty"),
        ({"prompt": [[]]}, "Prompt cannot be empty"),
        ({"prompt": ["a", 1]}, "prompt must be"),
        ({"prompt": ["a", [1]]}, "prompt must be"),
        ({"prompt": "a", "suffix": "b"}, "suffix is not supported"),
        ({"prompt": "a", "lora_path": "x"}, "Please set `--enable-lora`"),
        ({"prompt": "a", "temperature": -1}, "temperature must be a non-negative finite number"),
        ({"prompt": "a", "logprobs": 1000}, "logprobs must be in"),
        ({"prompt": "a", "n": 0}, "n must be in"),
        ({"prompt": "a", "priority": 1}, "--enable-priority-scheduling"),
        ({"prompt": "a", "response_format": {"type": "json_schema"}}, "schema_ is required"),
        ({"prompt": "a", "regex": "a", "response_format": {"type": "json_object"}}, "one thing only"),
        ({"prompt": [100_000]}, "greater than the vocab size"),
    ],
)
@asynchronous
async def test_refusals_have_both_shapes(body: dict[str, Any], message: str) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, body)
        said = answer.json()
        assert answer.status == 400 and message in said["message"]
        assert (said["object"], said["type"], said["code"]) == ("error", "BadRequestError", 400)
        assert said["error"] == {key: value for key, value in said.items() if key != "error"}


@pytest.mark.parametrize(
    "body", [{"prompt": "a", "max_tokens": -1}, {"prompt": 3}, {}, {"prompt": "a", "temperature": "hot"}]
)
@asynchronous
async def test_a_body_of_other_types_is_a_schema_error(body: dict[str, Any]) -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, body)
        assert (answer.status, answer.json()["type"]) == (400, "Bad Request")


@asynchronous
async def test_only_json_is_taken() -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"prompt": "a"}, headers={"content-type": "text/plain"})
        assert answer.status == 400 and "Only 'application/json' is allowed" in answer.json()["message"]


@asynchronous
async def test_an_embedding_model_does_not_complete() -> None:
    async with served(says("x"), is_embedding=True) as server:
        assert (await server.client.post(PATH, {"prompt": "a"})).status == 400


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_what_the_ring_refuses_has_its_status(stream: bool) -> None:
    refused = Finish.failed(RequestError("too long", Kind.BAD_REQUEST))
    async with served(ends(refused)) as server:
        answer = await server.client.post(PATH, {"prompt": "a", "stream": stream})
        assert (answer.status, answer.json()["message"]) == (400, "too long")


@asynchronous
async def test_an_error_inside_a_stream_is_an_event() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {"prompt": "hi", "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "a", prompt_tokens=3))
        await call.chunk()
        server.ring.push(step("r", finish=Finish.internal("broken")))
        error = (await call.answer()).events()[-1]["error"]
        assert error == {
            "object": "error",
            "message": "broken",
            "type": "InternalServerError",
            "param": None,
            "code": 500,
        }


@asynchronous
async def test_a_client_that_leaves_ends_its_requests() -> None:
    async with served() as server:
        gone = asyncio.Event()
        call = server.client.start("POST", PATH, {"prompt": "hi", "rid": "r", "n": 1}, gone=gone)
        await server.ring.sent_of(Generate)
        gone.set()
        [abort] = await server.ring.sent_of(Abort)
        assert abort.rid == "r"
        await call.answer()


@asynchronous
async def test_the_field_at_fault_is_named_from_wherever_it_was_found() -> None:
    refused = Finish.failed(RequestError("Failed to compile regex grammar", field="regex"))
    async with served(ends(refused)) as server:
        answer = await server.client.post(PATH, {"prompt": "a", "regex": "("})
        assert answer.json()["param"] == "regex"


@pytest.mark.parametrize(
    ("given", "kind", "name"),
    [
        ({"guided_json": {}}, "json_schema", "guided_json"),
        ({"guided_regex": "("}, "regex", "guided_regex"),
        ({"guided_choice": ["a"]}, "ebnf", "guided_choice"),
        ({"structured_outputs": {"grammar": "root ::="}}, "ebnf", "structured_outputs"),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {}}}}, "json_schema", "response_format"),
        ({"json_schema": "{}"}, "json_schema", "json_schema"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_refused_grammar_names_the_field_that_the_client_sent(
    given: dict[str, Any], kind: str, name: str, stream: bool
) -> None:
    refused = Finish.failed(RequestError(f"Failed to compile {kind} grammar: no regex", field=kind))
    async with served(ends(refused)) as server:
        answer = await server.client.post(PATH, {"prompt": "a", "stream": stream, **given})
        body = answer.json()
        assert (answer.status, body["param"]) == (400, name)
        assert body["message"] == f"Failed to compile {name} grammar: no regex"


@asynchronous
async def test_a_grammar_that_is_too_long_names_the_field_that_the_client_sent() -> None:
    async with served(says("x")) as server:
        answer = await server.client.post(PATH, {"prompt": "a", "guided_regex": "a" * 300_000})
        assert (answer.status, answer.json()["param"]) == (400, "guided_regex")
        answer = await server.client.post(PATH, {"prompt": "a", "guided_regex": "a", "guided_choice": ["b"]})
        assert answer.json()["message"] == (
            "The output can be constrained by one thing only, got guided_regex and guided_choice."
        )
