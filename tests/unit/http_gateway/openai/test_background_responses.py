"""Background responses from the client's side, on a ring that answers in process."""

import asyncio
import json
from typing import Any

import pytest
from openai.types import responses as sdk
from pydantic import TypeAdapter

from quartet.http_gateway.openai.background_responses import error_event
from quartet.http_gateway.routes.background_runs import BackgroundRuns
from quartet.http_gateway.routes.event_log import EventLogs
from quartet.runtime.control import Abort
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Finish, Generate
from tests.unit.http_gateway.harness import Served, asynchronous, served, step
from tests.unit.http_gateway.openai_scripts import says

PATH = "/v1/responses"
OVER = ("completed", "incomplete", "failed", "cancelled")
STREAM_EVENT: TypeAdapter[Any] = TypeAdapter(sdk.ResponseStreamEvent)


async def begun(server: Served, **body: Any) -> dict[str, Any]:
    """The first answer of a background response."""
    answer = await server.client.post(PATH, {"input": "hi", "background": True, **body})
    assert answer.status == 200, answer.text
    return checked(answer.text)


def checked(text: str) -> dict[str, Any]:
    """The response, which is one as the `openai` package knows it."""
    sdk.Response.model_validate_json(text, strict=True)
    found: dict[str, Any] = json.loads(text)
    return found


async def current(server: Served, response_id: str) -> dict[str, Any]:
    answer = await server.client.get(f"{PATH}/{response_id}")
    assert answer.status == 200, answer.text
    return checked(answer.text)


async def ended(server: Served, response_id: str) -> dict[str, Any]:
    """The response, asked for until it is over."""
    while (response := await current(server, response_id))["status"] not in OVER:
        await asyncio.sleep(0)
    return response


def events_in(text: str) -> list[dict[str, Any]]:
    """The events of a stream, each one of the `openai` package's."""
    lines = [line.removeprefix("data: ") for line in text.split("\n") if line.startswith("data: ")]
    for line in lines:
        STREAM_EVENT.validate_json(line, strict=True)
    return [json.loads(line) for line in lines]


def names_of(events: list[dict[str, Any]]) -> list[str]:
    return [event["type"].removeprefix("response.") for event in events]


async def request_of(server: Served) -> str:
    [generate] = await server.ring.sent_of(Generate)
    rid: str = generate.request.rid
    return rid


@asynchronous
async def test_a_background_response_is_queued_then_runs_then_is_complete() -> None:
    async with served() as server:
        first = await begun(server, metadata={"a": "b"})
        assert (first["status"], first["background"], first["output"]) == ("queued", True, [])
        assert (await current(server, first["id"]))["status"] == "queued"
        server.ring.push(step(first["id"], [1], "Par", prompt_tokens=3))
        while (response := await current(server, first["id"]))["status"] == "queued":
            await asyncio.sleep(0)
        assert response["status"] == "in_progress"
        server.ring.push(step(first["id"], [2], "is.", finish=Finish(reason="stop", matched=2)))
        response = await ended(server, first["id"])
        assert response["status"] == "completed" and response["completed_at"]
        assert response["output"][0]["content"][0]["text"] == "Paris." and response["metadata"] == {"a": "b"}
        assert response["usage"]["output_tokens"] == 2


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_background_response_whose_call_was_broken_off_is_incomplete(stream: bool) -> None:
    text = '<tool_call>{"name": "weather", "arguments": {"city": "U'
    script = says(text, finish=Finish(reason="stop", length=1, matched="lm"))
    async with served(script, tool_call_parser="hermes") as server:
        asked = {
            "input": "hi",
            "background": True,
            "stream": stream,
            "tools": [{"type": "function", "name": "weather"}],
        }
        answer = await server.client.post(PATH, asked)
        first = events_in(answer.text)[0]["response"] if stream else answer.json()
        response = await ended(server, first["id"])
        assert (response["status"], response["output"][0]["status"]) == ("incomplete", "incomplete")
        if stream:
            assert events_in(answer.text)[-1]["response"] == response


@asynchronous
async def test_a_background_response_can_be_gone_on_from_when_it_is_over() -> None:
    async with served() as server:
        first = await begun(server)
        more = {"input": "b", "previous_response_id": first["id"]}
        refused = await server.client.post(PATH, more)
        assert refused.status == 400 and "not over" in refused.json()["error"]["message"]
        server.ring.script = says("x")
        server.ring.push(step(first["id"], [1], "one", finish=Finish(reason="stop", matched=1)))
        await ended(server, first["id"])
        assert (await server.client.post(PATH, more)).json()["status"] == "completed"
        assert [message["role"] for message in server.ring.sent[-1].chat.messages] == ["user", "assistant", "user"]


@asynchronous
async def test_a_cancelled_response_aborts_its_request_and_keeps_its_text() -> None:
    async with served() as server:
        first = await begun(server, stream=False)
        server.ring.push(step(first["id"], [1], "Par", prompt_tokens=3))
        while (await current(server, first["id"]))["status"] == "queued":
            await asyncio.sleep(0)
        for _ in range(2):  # the second time, it is over
            answer = await server.client.post(f"{PATH}/{first['id']}/cancel")
            assert answer.status == 200 and checked(answer.text)["status"] == "cancelled"
        [abort] = await server.ring.sent_of(Abort)
        assert abort.rid == first["id"]
        response = await current(server, first["id"])
        [item] = response["output"]
        assert (response["status"], item["status"], item["content"][0]["text"]) == ("cancelled", "incomplete", "Par")


@asynchronous
async def test_a_completed_background_response_is_returned_where_it_is_cancelled() -> None:
    async with served(says("x")) as server:
        response = await ended(server, (await begun(server))["id"])
        assert (await server.client.post(f"{PATH}/{response['id']}/cancel")).json() == response


@asynchronous
async def test_a_deleted_response_runs_no_longer() -> None:
    async with served() as server:
        first = await begun(server, stream=False)
        assert (await server.client.call("DELETE", f"{PATH}/{first['id']}")).json()["deleted"] is True
        assert (await server.client.get(f"{PATH}/{first['id']}")).status == 404
        [abort] = await server.ring.sent_of(Abort)
        assert abort.rid == first["id"]


@asynchronous
async def test_a_stream_can_be_read_again_from_any_event_on() -> None:
    async with served() as server:
        gone = asyncio.Event()
        call = server.client.start("POST", PATH, {"input": "hi", "background": True, "stream": True}, gone=gone)
        rid = await request_of(server)
        await call.chunk()
        early = events_in((await call.chunk()).decode())
        assert names_of(early) == ["created", "queued"] and early[-1]["response"]["status"] == "queued"
        gone.set()  # the client leaves, the response goes on
        await call.answer()
        following = server.client.start("GET", f"{PATH}/{rid}?stream=true&starting_after=1")
        assert await following.chunk() == b""
        server.ring.push(step(rid, [1], "Par", prompt_tokens=3))
        server.ring.push(step(rid, [2], "is.", finish=Finish(reason="stop", matched=2)))
        late = events_in((await following.answer()).text)
        assert [event["sequence_number"] for event in early + late] == list(range(len(early + late)))
        assert names_of(late)[0] == "in_progress" and names_of(late)[-1] == "completed"
        assert late[-1]["response"] == await current(server, rid)
        whole = events_in((await server.client.get(f"{PATH}/{rid}?stream=true")).text)
        assert whole == early + late
        assert events_in((await server.client.get(f"{PATH}/{rid}?stream=true&starting_after=999")).text) == []


@asynchronous
async def test_who_creates_a_stream_gets_its_events_though_none_are_kept() -> None:
    async with served() as server:
        server.gateway.event_logs = EventLogs(most_bytes=1)
        call = server.client.start("POST", PATH, {"input": "hi", "background": True, "stream": True})
        rid = await request_of(server)
        again = await server.client.get(f"{PATH}/{rid}?stream=true")
        assert (again.status, again.json()["error"]["param"]) == (400, "stream")
        server.ring.push(step(rid, [1], "Paris.", finish=Finish(reason="stop", matched=1), prompt_tokens=3))
        events = events_in((await call.answer()).text)
        assert (names_of(events)[0], events[0]["response"]["id"]) == ("created", rid)
        assert [event["sequence_number"] for event in events] == list(range(len(events)))
        assert events[-1]["response"] == await current(server, rid) and events[-1]["type"] == "response.completed"


@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_no_more_responses_run_in_the_background_than_the_server_takes(stream: bool) -> None:
    async with served() as server:
        server.gateway.background = BackgroundRuns(most_runs=1)
        first = await begun(server)
        more = {"input": "hi", "background": True, "stream": stream}
        answer = await server.client.post(PATH, more)
        assert (answer.status, answer.json()["error"]["param"]) == (503, "background")
        assert len(await server.ring.sent_of(Generate)) == 1
        server.ring.push(step(first["id"], [1], "x", finish=Finish(reason="stop", matched=1)))
        await ended(server, first["id"])
        assert (await begun(server))["status"] == "queued"


@asynchronous
async def test_the_stream_of_a_cancelled_response_ends() -> None:
    async with served() as server:
        call = server.client.start("POST", PATH, {"input": "hi", "background": True, "stream": True})
        rid = await request_of(server)
        assert (await server.client.post(f"{PATH}/{rid}/cancel")).status == 200
        last = events_in((await call.answer()).text)[-1]
        assert last["type"] == "response.failed" and last["response"]["status"] == "cancelled"


@pytest.mark.parametrize(
    ("finish", "code"),
    [
        (Finish(reason="error", message="too long", status=400), "invalid_prompt"),
        (Finish(reason="error", message="broken", status=500), "server_error"),
        (Finish(reason="abort", message="x"), "server_error"),
    ],
)
@asynchronous
async def test_a_response_that_fails_says_why(finish: Finish, code: str) -> None:
    async with served() as server:
        for stream in (False, True):
            call = server.client.start("POST", PATH, {"input": "hi", "background": True, "stream": stream})
            rid = (await server.ring.sent_of(Generate, 1 + stream))[-1].request.rid
            server.ring.push(step(rid, finish=finish))
            response = await ended(server, rid)
            assert response["status"] == "failed" and response["error"]["code"] == code
            if finish.reason == "error":
                assert response["error"]["message"] == finish.message
            text = (await call.answer()).text
            assert not stream or events_in(text)[-1]["response"] == response


@asynchronous
async def test_a_response_that_is_not_complete_has_failed_in_the_eyes_of_the_next_server() -> None:
    async with served() as server:
        first = await begun(server)
        kept = server.gateway.stored_responses.get(first["id"])
        assert kept is not None
        response = checked(kept.response.decode())
        assert response["status"] == "failed" and "server ended" in response["error"]["message"]
        listed = (await server.client.get(f"{PATH}/{first['id']}/input_items")).json()
        assert listed["data"][0]["content"][0]["text"] == "hi"


@asynchronous
async def test_a_refused_request_leaves_nothing_behind() -> None:
    async with served(limit=1) as server:
        await begun(server)
        answer = await server.client.post(PATH, {"input": "hi", "background": True})
        assert answer.status == 503
        with server.gateway.stored_responses._transaction() as database:
            assert database.execute("SELECT count(*) FROM responses").fetchone() == (1,)


@asynchronous
async def test_a_response_that_outgrows_the_store_says_so() -> None:
    async with served(responses_store_size=2000) as server:
        first = await begun(server)
        server.ring.push(step(first["id"], [1], "x" * 3000, finish=Finish(reason="stop", matched=1)))
        response = await ended(server, first["id"])
        assert response["status"] == "failed" and "--responses-store-size" in response["error"]["message"]


@asynchronous
async def test_without_room_in_the_store_nothing_runs_in_the_background() -> None:
    async with served(responses_store_size=0) as server:
        answer = await server.client.post(PATH, {"input": "hi", "background": True})
        assert answer.status == 400 and answer.json()["error"]["param"] == "background"
        assert not server.ring.sent


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=true", "stream"),
        ("stream=maybe", "stream"),
        ("starting_after=1", "starting_after"),
        ("stream=true&starting_after=-1", "starting_after"),
    ],
)
@asynchronous
async def test_what_cannot_be_streamed_is_refused(query: str, param: str) -> None:
    async with served(says("x")) as server:
        response = await ended(server, (await begun(server))["id"])
        answer = await server.client.get(f"{PATH}/{response['id']}?{query}")
        assert (answer.status, answer.json()["error"]["param"]) == (400, param)
        assert (await server.client.get(f"{PATH}/resp_x?stream=true")).status == 404


def test_an_error_of_a_stream_is_an_event() -> None:
    event = STREAM_EVENT.validate_json(error_event(RequestError("gone"), 3), strict=True)
    assert (event.type, event.message, event.sequence_number) == ("error", "gone", 3)
