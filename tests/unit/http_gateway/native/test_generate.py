"""/generate from the client's side, on a ring that answers in process."""

import asyncio
import base64
import re

import pytest

from quartet.runtime.control import Abort
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import ABORTED, ABORTED_IN_QUEUE, Drafts, Finish, Generate, Logprobs, Message, pack_ids
from tests.unit.http_gateway.harness import asynchronous, ends, floats, served, step, words

NAN = float("nan")


@asynchronous
async def test_one_prompt_is_answered_by_one_object() -> None:
    async with served(words("Par", "is", ".")) as server:
        answer = await server.client.post("/generate", {"text": "hi", "rid": "r"})
        body = answer.json()
        latency = body["meta_info"].pop("e2e_latency")
        assert answer.status == 200 and latency >= 0
        assert body == {
            "text": "Paris.",
            "output_ids": [1, 2, 3],
            "meta_info": {
                "id": "r",
                "finish_reason": {"type": "stop", "matched": 3},
                "prompt_tokens": 3,
                "weight_version": "v1",
                "completion_tokens": 3,
                "cached_tokens": 0,
                "num_retractions": 0,
                "weight_versions": [{"version": "v1", "start": 0, "end": 3}],
            },
        }


@asynchronous
async def test_what_came_of_drafts_is_told_where_the_server_speculates() -> None:
    async with served() as server:
        call = server.client.start("POST", "/generate", {"text": "hi", "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        end = Finish(reason="length", length=7)
        for pushed in (
            step("r", [1], "a", prompt_tokens=3),
            step("r", [2, 3, 4], "bcd", drafts=Drafts(proposed=4, correct=2)),
            step("r", [5], "e", drafts=Drafts()),
            step("r", [6, 7], "fg", drafts=Drafts(proposed=1, correct=1), finish=end),
        ):
            server.ring.push(pushed)
            await call.chunk()
        first, *_, last = (await call.answer()).events()
        assert not any(key.startswith("spec_") for key in first["meta_info"])
        assert last["output_ids"] == [1, 2, 3, 4, 5, 6, 7] and last["text"] == "abcdefg"
        told = {key: value for key, value in last["meta_info"].items() if key.startswith("spec_")}
        assert told == {
            "spec_verify_ct": 3,
            "spec_accept_rate": 3 / 5,
            "spec_accept_length": 7 / 3,
            "spec_num_correct_drafts": 3,
            "spec_num_proposed_drafts": 5,
            "spec_correct_drafts_histogram": [1, 1, 1],
        }


@pytest.mark.parametrize("method", ["POST", "PUT"])
@asynchronous
async def test_both_methods_and_any_content_type(method: str) -> None:
    async with served(words("x")) as server:
        headers = {"content-type": "application/x-www-form-urlencoded"}
        answer = await server.client.call(method, "/generate", {"text": "hi"}, headers=headers)
        assert answer.json()["text"] == "x"


@asynchronous
async def test_a_batch_is_answered_in_its_own_order() -> None:
    async with served() as server:
        call = asyncio.create_task(server.client.post("/generate", {"text": ["a", "b"], "rid": ["p", "q"]}))
        await server.ring.sent_of(Generate, 2)
        end = Finish(reason="length", length=1)
        server.ring.push(step("q", [2], "second", finish=end))
        server.ring.push(step("p", [1], "first", finish=end))
        assert [item["text"] for item in (await call).json()] == ["first", "second"]


@asynchronous
async def test_copies_wait_for_the_prompt_to_be_cached_once() -> None:
    async with served(words("x")) as server:
        answer = await server.client.post("/generate", {"text": "hi", "sampling_params": {"n": 3}})
        sent = await server.ring.sent_of(Generate)
        assert [item.request.params.max_new_tokens for item in sent] == [0, 128, 128, 128]
        assert len({item["meta_info"]["id"] for item in answer.json()}) == 3


@asynchronous
async def test_an_abort_while_prompts_are_being_cached_means_their_copies() -> None:
    async with served() as server:
        body = {"text": ["a", "b"], "rid": ["p", "q"], "sampling_params": {"n": 2}}
        call = server.client.start("POST", "/generate", body)
        first, second = await server.ring.sent_of(Generate, 2)
        assert (await server.client.post("/abort_request", {"rid": "q"})).status == 200
        assert [abort.rid for abort in await server.ring.sent_of(Abort)] == [second.request.rid]
        server.ring.push(step(first.request.rid, finish=Finish(reason="length", length=0)))
        server.ring.push(step(second.request.rid, finish=Finish(reason="abort", message="Abort before prefill")))
        copies = (await server.ring.sent_of(Generate, 6))[2:]
        aborted = (await server.ring.sent_of(Abort, 3))[1:]
        assert [abort.rid for abort in aborted] == [copy.request.rid for copy in copies[2:]]
        for copy in copies:
            server.ring.push(step(copy.request.rid, finish=Finish(reason="stop", matched=1)))
        assert len((await call.answer()).json()) == 4


@asynchronous
async def test_a_stream_repeats_the_text_so_far() -> None:
    async with served() as server:
        call = server.client.start("POST", "/generate", {"text": "hi", "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        for i, piece in enumerate(['a"\n', "é", "c"]):
            server.ring.push(
                step("r", [i], piece, prompt_tokens=3, finish=Finish(reason="length", length=3) if i == 2 else None)
            )
            await call.chunk()
        answer = await call.answer()
        assert answer.headers["content-type"].startswith("text/event-stream")
        assert answer.headers["cache-control"] == "no-cache, no-transform"  # so that no proxy holds events back
        assert answer.headers["x-accel-buffering"] == "no"
        events = answer.events()
        assert [event["text"] for event in events] == ['a"\n', 'a"\né', 'a"\néc']
        assert [event["output_ids"] for event in events] == [[0], [0, 1], [0, 1, 2]]
        assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 2, 3]
        assert [event["meta_info"]["finish_reason"] for event in events[:2]] == [None, None]
        assert "e2e_latency" in events[2]["meta_info"] and "e2e_latency" not in events[0]["meta_info"]


@asynchronous
async def test_an_incremental_stream_holds_only_what_is_new() -> None:
    async with served(incremental_streaming_output=True) as server:
        body = {"text": "hi", "rid": "r", "stream": True, "return_logprob": True, "logprob_start_len": 0}
        call = server.client.start("POST", "/generate", body)
        await server.ring.sent_of(Generate)
        prompt = Logprobs(ids=pack_ids([7, 8]), values=floats(NAN, -1.0))
        for i, piece in enumerate("ab"):
            server.ring.push(
                step(
                    "r",
                    [i],
                    piece,
                    logprobs=Logprobs(ids=pack_ids([i]), values=floats(-0.5)),
                    input_logprobs=prompt if i == 0 else None,
                    finish=Finish(reason="length", length=2) if i else None,
                )
            )
            await call.chunk()
        first, second = (await call.answer()).events()
        assert (first["text"], second["text"]) == ("a", "b")
        assert (first["output_ids"], second["output_ids"]) == ([0], [1])
        assert first["meta_info"]["input_token_logprobs"] == [[None, 7, None], [-1.0, 8, None]]
        assert second["meta_info"]["input_token_logprobs"] == []
        assert second["meta_info"]["output_token_logprobs"] == [[-0.5, 1, None]]
        assert second["meta_info"]["completion_tokens"] == 2


@asynchronous
async def test_chunks_of_a_batch_say_whose_they_are() -> None:
    async with served(words("x", "y")) as server:
        answer = await server.client.post("/generate", {"text": ["a", "b"], "stream": True})
        last = {event["index"]: event["text"] for event in answer.events()}
        assert last == {0: "xy", 1: "xy"}


@asynchronous
async def test_stream_interval_spaces_the_chunks() -> None:
    async with served() as server:
        body = {"text": "hi", "rid": "r", "stream": True, "sampling_params": {"stream_interval": 3}}
        call = server.client.start("POST", "/generate", body)
        await server.ring.sent_of(Generate)
        for i in range(1, 7):
            server.ring.push(step("r", [i], "x", finish=Finish(reason="length", length=6) if i == 6 else None))
            if i in (1, 4, 6):
                await call.chunk()
        events = (await call.answer()).events()
        assert [event["meta_info"]["completion_tokens"] for event in events] == [1, 4, 6]


@asynchronous
async def test_logprob_arrays() -> None:
    async with served() as server:
        body = {
            "input_ids": [7, 8],
            "rid": "r",
            "return_logprob": True,
            "logprob_start_len": 0,
            "top_logprobs_num": 2,
            "token_ids_logprob": [5, 6],
            "return_text_in_logprobs": True,
        }
        call = asyncio.create_task(server.client.post("/generate", body))
        [sent] = await server.ring.sent_of(Generate)
        assert sent.request.logprobs.text
        prompt = Logprobs(
            ids=pack_ids([7, 8]),
            values=floats(NAN, -1.0),
            top_ids=pack_ids([0, 0, 8, 9]),
            top_values=floats(NAN, NAN, -1.0, -2.0),
            asked_values=floats(NAN, NAN, -3.0, -4.0),
            texts=[b"t7", b"t8"],
            top_texts=[b"", b"", b"t8", b"t9"],
            asked_texts=[b"t5", b"t6"],
        )
        output = Logprobs(
            ids=pack_ids([1]),
            values=floats(-0.25),
            top_ids=pack_ids([1, 2]),
            top_values=floats(-0.25, float("-inf")),
            asked_values=floats(-5.0, -6.0),
            texts=[b"t1"],
            top_texts=[b"t1", b"t2"],
            asked_texts=[b"t5", b"t6"],
        )
        server.ring.push(
            step("r", [1], "x", input_logprobs=prompt, logprobs=output, finish=Finish(reason="length", length=1))
        )
        meta = (await call).json()["meta_info"]
        assert meta["input_token_logprobs"] == [[None, 7, "t7"], [-1.0, 8, "t8"]]
        assert meta["input_top_logprobs"] == [None, [[-1.0, 8, "t8"], [-2.0, 9, "t9"]]]
        assert meta["input_token_ids_logprobs"] == [None, [[-3.0, 5, "t5"], [-4.0, 6, "t6"]]]
        assert meta["output_token_logprobs"] == [[-0.25, 1, "t1"]]
        assert meta["output_top_logprobs"] == [[[-0.25, 1, "t1"], [None, 2, "t2"]]]
        assert meta["output_token_ids_logprobs"] == [[[-5.0, 5, "t5"], [-6.0, 6, "t6"]]]


@asynchronous
async def test_weight_versions_are_runs_of_output_tokens() -> None:
    async with served() as server:
        call = asyncio.create_task(server.client.post("/generate", {"text": "hi", "rid": "r"}))
        await server.ring.sent_of(Generate)
        for ids, version in (([1, 2], "a"), ([3], "a"), ([4], "b")):
            message = step("r", ids)
            message.tokens.weight_version = version
            server.ring.push(message)
        server.ring.push(step("r", finish=Finish(reason="length", length=4)))
        meta = (await call).json()["meta_info"]
        assert meta["weight_versions"] == [
            {"version": "a", "start": 0, "end": 3},
            {"version": "b", "start": 3, "end": 4},
        ]
        assert meta["weight_version"] == "b"


@asynchronous
async def test_a_running_request_that_is_aborted_keeps_what_it_has() -> None:
    async with served() as server:
        call = asyncio.create_task(server.client.post("/generate", {"text": "hi", "rid": "r"}))
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "par"), step("r", finish=Finish(reason="abort", message=ABORTED)))
        body = (await call).json()
        assert (body["text"], body["output_ids"]) == ("par", [1])
        assert body["meta_info"]["finish_reason"] == {
            "type": "abort",
            "message": "Aborted",
            "status_code": None,
            "err_type": None,
        }


@asynchronous
async def test_a_request_aborted_in_the_queue_has_empty_arrays() -> None:
    async with served(ends(Finish(reason="abort", message=ABORTED_IN_QUEUE))) as server:
        answer = await server.client.post("/generate", {"text": "hi"})
        body = answer.json()
        assert answer.status == 200
        assert (body["text"], body["output_ids"], body["meta_info"]["output_token_logprobs"]) == ("", [], [])
        assert body["meta_info"]["finish_reason"]["message"].startswith("Abort before prefill")
        assert (body["meta_info"]["prompt_tokens"], body["meta_info"]["completion_tokens"]) == (0, 0)


@asynchronous
async def test_without_a_tokenizer_there_is_no_text() -> None:
    async with served(words(""), skip_tokenizer_init=True) as server:
        body = (await server.client.post("/generate", {"input_ids": [1]})).json()
        assert set(body) == {"output_ids", "meta_info"}


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_refusal_of_the_ring_is_a_real_status_even_for_a_stream(stream: bool) -> None:
    refused = Finish.failed(RequestError("The input (600 tokens) is longer than the model's context length."))
    async with served(ends(refused)) as server:
        answer = await server.client.post("/generate", {"text": "hi", "stream": stream})
        assert answer.status == 400
        assert answer.json() == {"error": {"message": refused.message}}


@asynchronous
async def test_a_full_queue_is_a_503_that_says_when_to_come_back() -> None:
    full = Finish.failed(RequestError("The request queue is full.", Kind.UNAVAILABLE))
    async with served(ends(full)) as server:
        answer = await server.client.post("/generate", {"text": "hi"})
        body = answer.json()
        assert (answer.status, answer.headers["retry-after"]) == (503, "1")
        assert (body["object"], body["message"], body["type"], body["code"]) == ("error", full.message, "503", 503)


@asynchronous
async def test_one_failing_element_fails_the_batch_and_ends_the_others() -> None:
    async with served() as server:
        call = asyncio.create_task(server.client.post("/generate", {"text": ["a", "b"], "rid": ["p", "q"]}))
        await server.ring.sent_of(Generate, 2)
        server.ring.push(step("q", finish=Finish.failed(RequestError("no"))))
        assert (await call).json() == {"error": {"message": "no"}}
        assert [abort.rid for abort in await server.ring.sent_of(Abort)] == ["p"]


@asynchronous
async def test_an_error_behind_the_headers_is_told_in_the_stream() -> None:
    async with served() as server:
        call = server.client.start("POST", "/generate", {"text": "hi", "rid": "r", "stream": True})
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "x"))
        await call.chunk()
        server.ring.push(step("r", finish=Finish.internal("NaN in the logits")))
        answer = await call.answer()
        assert answer.status == 200
        assert answer.events()[-1]["error"]["message"] == "NaN in the logits"


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_client_that_leaves_has_its_request_aborted_at_once(stream: bool) -> None:
    async with served() as server:
        gone = asyncio.Event()
        call = asyncio.create_task(
            server.client.call("POST", "/generate", {"text": "hi", "rid": "r", "stream": stream}, gone=gone)
        )
        await server.ring.sent_of(Generate)
        gone.set()
        assert [abort.rid for abort in await server.ring.sent_of(Abort)] == ["r"]
        assert (await call).status == 0


@asynchronous
async def test_a_background_request_goes_on_when_its_client_leaves() -> None:
    async with served() as server:
        gone = asyncio.Event()
        gone.set()
        body = {"text": "hi", "rid": "r", "background": True}
        call = asyncio.create_task(server.client.call("POST", "/generate", body, gone=gone))
        await server.ring.sent_of(Generate)
        server.ring.push(step("r", [1], "x", finish=Finish(reason="length", length=1)))
        assert (await call).json()["text"] == "x"


@asynchronous
async def test_bodies_that_are_no_json_or_of_wrong_types_are_flat_errors() -> None:
    async with served(words("x")) as server:
        for body in (b"{", b"", b"[]", b'{"text": 5}', b'{"text": "\xff"}', b"[" * 100_000):
            answer = await server.client.post("/generate", body)
            assert (answer.status, answer.json()["object"], answer.json()["type"]) == (400, "error", "Bad Request")
        answer = await server.client.post("/generate", {"text": "a", "sampling_params": {"top_p": "x"}})
        assert "top_p" in answer.json()["message"]


@asynchronous
async def test_a_rid_in_flight_cannot_be_used_again() -> None:
    async with served() as server:
        first = asyncio.create_task(server.client.post("/generate", {"text": "hi", "rid": "r"}))
        await server.ring.sent_of(Generate)
        second = await server.client.post("/generate", {"text": "hi", "rid": "r"})
        assert (second.status, second.json()) == (400, {"error": {"message": "Duplicate request ID detected: r"}})
        server.ring.push(step("r", finish=Finish(reason="length", length=0)))
        assert (await first).status == 200


@asynchronous
async def test_an_embedding_model_does_not_generate() -> None:
    async with served(words("x"), is_embedding=True) as server:
        answer = await server.client.post("/generate", {"text": "hi"})
        assert answer.status == 400
        assert "use /encode" in answer.json()["error"]["message"]


@asynchronous
async def test_another_rank_than_ours_is_refused() -> None:
    async with served(words("x")) as server:
        answer = await server.client.post("/generate", {"text": "hi"}, headers={"x-data-parallel-rank": "1"})
        assert answer.status == 400
        assert (
            await server.client.post("/generate", {"text": "hi"}, headers={"x-data-parallel-rank": "0"})
        ).status == 200


@asynchronous
async def test_rids_are_drawn_as_32_hex_digits() -> None:
    async with served(words("x")) as server:
        body = (await server.client.post("/generate", {"text": "hi"})).json()
        assert re.fullmatch("[0-9a-f]{32}", body["meta_info"]["id"])


@asynchronous
async def test_vertex_wraps_instances_and_parameters() -> None:
    async with served(words("x")) as server:
        body = {"instances": [{"text": "a"}, {"text": "b"}], "parameters": {"max_new_tokens": 4}}
        answer = await server.client.post("/vertex_generate", body)
        assert [item["text"] for item in answer.json()["predictions"]] == ["x", "x"]
        assert {item.request.params.max_new_tokens for item in await server.ring.sent_of(Generate)} == {4}
        assert (await server.client.post("/vertex_generate", {"instances": []})).status == 400


@asynchronous
async def test_routed_experts_arrive_in_base64_with_the_end() -> None:
    end = Finish(reason="length", length=1)

    def script(generate: Generate) -> list[Message]:
        return [step(generate.request.rid, [1], "a", finish=end, routed_experts=pack_ids([7, 8]))]

    async with served(script, enable_return_routed_experts=True) as server:
        asking = (await server.client.post("/generate", {"text": "hi", "return_routed_experts": True})).json()
        silent = (await server.client.post("/generate", {"text": "hi"})).json()
        assert base64.b64decode(asking["meta_info"]["routed_experts"]) == pack_ids([7, 8])
        assert "routed_experts" not in silent["meta_info"]
