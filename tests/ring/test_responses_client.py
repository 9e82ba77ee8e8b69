"""The `openai` package's Responses API, unchanged, against real servers."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
import requests
from openai.types.responses import Response, ResponseFunctionToolCall
from pydantic import BaseModel

from tests.servers import Server, launched

WAIT_S = 60
POLL_S = 0.05
QUESTION = "What is the capital of France?"
ANSWER = "The capital of France is Paris."
WEATHER: Any = {
    "type": "function",
    "name": "weather",
    "description": "Tells the weather.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}, "days": {"type": "integer", "maximum": 9}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
}
NAMED: Any = {"type": "function", "name": "weather"}


def client_of(server: Server) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="k", max_retries=0, timeout=WAIT_S)


@pytest.fixture(scope="module")
def server(launch_for_module: Callable[..., Server]) -> Server:
    return launch_for_module("--tool-call-parser", "hermes", "--reasoning-parser", "qwen3")


@pytest.fixture(scope="module")
def client(server: Server) -> openai.OpenAI:
    return client_of(server)


def ask(client: openai.OpenAI, given: Any = QUESTION, **more: Any) -> Response:
    return client.responses.create(model="demo", input=given, temperature=0, **more)


def ask_for_events(client: openai.OpenAI, **more: Any) -> Any:
    """The same as a stream."""
    return client.responses.create(model="demo", input=QUESTION, temperature=0, stream=True, **more)


def call_of(response: Response) -> ResponseFunctionToolCall:
    [call] = response.output
    assert call.type == "function_call" and response.status == "completed"
    return call


# functions


def test_a_demanded_call_fits_its_schema(client: openai.OpenAI) -> None:
    call = call_of(ask(client, tools=[WEATHER], tool_choice=NAMED))
    assert call.name == "weather" and call.status == "completed"
    assert json.loads(call.arguments).keys() == {"city", "days"}


def test_streamed_arguments_add_up_to_the_whole_call(client: openai.OpenAI) -> None:
    whole = call_of(ask(client, tools=[WEATHER], tool_choice="required", parallel_tool_calls=False))
    asked: Any = {"tools": [WEATHER], "tool_choice": "required", "parallel_tool_calls": False}
    with client.responses.stream(model="demo", input=QUESTION, temperature=0, **asked) as stream:
        pieces = [event.delta for event in stream if event.type == "response.function_call_arguments.delta"]
        call = call_of(stream.get_final_response())
    assert len(pieces) > 1 and "".join(pieces) == call.arguments == whole.arguments
    assert call.name == whole.name


def test_the_result_of_a_call_is_sent_back(client: openai.OpenAI) -> None:
    conversation: list[Any] = [{"role": "user", "content": "How is the weather?"}]
    response = ask(client, conversation, tools=[WEATHER], tool_choice=NAMED)
    conversation += response.output
    conversation.append(
        {"type": "function_call_output", "call_id": call_of(response).call_id, "output": "rain"},
    )
    conversation.append({"role": "user", "content": QUESTION})
    answer = ask(client, conversation, tools=[WEATHER])
    assert answer.status == "completed" and answer.output_text
    assert answer.usage and response.usage and answer.usage.input_tokens > response.usage.input_tokens


def test_tools_that_need_not_be_called(client: openai.OpenAI) -> None:
    for choice in ("auto", "none"):
        assert ask(client, tools=[WEATHER], tool_choice=choice).output[0].type == "message"


# conversations that are kept


def test_a_conversation_goes_on_from_a_stored_response(client: openai.OpenAI) -> None:
    first = ask(client, "Tell me a story.", max_output_tokens=20)
    with client.responses.stream(model="demo", input=QUESTION, temperature=0, previous_response_id=first.id) as stream:
        second = stream.get_final_response()
    turns: Any = [
        {"role": "user", "content": "Tell me a story."},
        {"role": "assistant", "content": first.output_text},
        {"role": "user", "content": QUESTION},
    ]
    whole = ask(client, turns, store=False)
    assert second.output_text == whole.output_text and second.previous_response_id == first.id
    assert second.usage and whole.usage and first.usage
    assert second.usage.input_tokens == whole.usage.input_tokens
    assert second.usage.input_tokens_details.cached_tokens > first.usage.input_tokens
    kept = client.responses.retrieve(second.id)
    assert (kept.output_text, kept.usage, kept.status) == (second.output_text, second.usage, "completed")
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(whole.id)


def test_the_loop_of_a_tool_goes_on_from_stored_responses(client: openai.OpenAI) -> None:
    call = ask(client, "How is the weather?", tools=[WEATHER], tool_choice=NAMED)
    output: Any = {"type": "function_call_output", "call_id": call_of(call).call_id, "output": "rain"}
    answer = ask(client, [output], previous_response_id=call.id, tools=[WEATHER])
    assert answer.status == "completed" and answer.output_text
    [listed] = client.responses.input_items.list(answer.id)
    assert listed.type == "function_call_output" and listed.output == "rain"


def test_a_deleted_response_is_gone(client: openai.OpenAI) -> None:
    response = ask(client)
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        client.responses.cancel(response.id)
    client.responses.delete(response.id)
    for call in (client.responses.retrieve, client.responses.delete, client.responses.cancel):
        with pytest.raises(openai.NotFoundError):
            call(response.id)
    with pytest.raises(openai.BadRequestError) as error:
        ask(client, previous_response_id=response.id)
    assert error.value.code == "previous_response_not_found"


@pytest.fixture(scope="module")
def restarted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Server, Response]]:
    """A server with a store of its own, and what the server before it has answered."""
    flags = ("--responses-store", str(tmp_path_factory.mktemp("store") / "responses.sqlite"))
    with launched(*flags) as server:
        response = ask(client_of(server))
    with launched(*flags) as server:
        yield server, response


def test_a_store_with_a_path_of_its_own_outlasts_the_server(restarted: tuple[Server, Response]) -> None:
    server, response = restarted
    client = client_of(server)
    assert client.responses.retrieve(response.id) == response
    assert ask(client, "b", previous_response_id=response.id).previous_response_id == response.id


def test_a_store_that_cannot_be_opened_is_named_at_start(tmp_path: Path) -> None:
    with launched("--responses-store", str(tmp_path / "no" / "file"), ready=False) as server:
        server.wait_for("--responses-store")


# responses in the background


def over(client: openai.OpenAI, response_id: str) -> Response:
    """The response, asked for until it is over."""
    while (response := client.responses.retrieve(response_id)).status in ("queued", "in_progress"):
        time.sleep(POLL_S)
    return response


@contextlib.contextmanager
def paused(server: Server) -> Iterator[None]:
    """The server generates nothing inside the block."""
    requests.post(f"{server.url}/pause_generation", json={"mode": "in_place"}, timeout=WAIT_S).raise_for_status()
    yield
    requests.post(f"{server.url}/continue_generation", json={}, timeout=WAIT_S).raise_for_status()


def test_a_background_response_is_asked_for_until_it_is_over(server: Server, client: openai.OpenAI) -> None:
    with paused(server):
        first = ask(client, background=True)
        assert first.status == client.responses.retrieve(first.id).status == "queued" and first.background
    response = over(client, first.id)
    assert response.status == "completed" and response.output_text == ANSWER
    assert client.responses.cancel(response.id) == response


def test_a_background_response_is_cancelled(server: Server, client: openai.OpenAI) -> None:
    with paused(server):
        first = ask(client, background=True)
        assert client.responses.cancel(first.id).status == "cancelled"
    assert client.responses.retrieve(first.id).status == "cancelled"


def test_the_stream_of_a_background_response_is_read_again(client: openai.OpenAI) -> None:
    events = list(ask_for_events(client, background=True))
    assert [event.type for event in events[:3]] == ["response.created", "response.queued", "response.in_progress"]
    assert [event.sequence_number for event in events] == list(range(len(events)))
    rest = list(client.responses.retrieve(events[0].response.id, stream=True, starting_after=1))
    assert rest == events[2:] and rest[-1].response.output_text == ANSWER


def test_a_background_response_has_failed_where_its_server_has_ended(restarted: tuple[Server, Response]) -> None:
    server, _ = restarted
    with paused(server):
        client = client_of(server)
        first = ask(client, background=True)
        server.children()["gateway"].kill()
        kept = client.with_options(max_retries=8).responses.retrieve(first.id)
        assert kept.status == "failed" and kept.error and "server ended" in kept.error.message


# texts


class Capital(BaseModel):
    big: bool


def test_a_parsed_answer_is_an_object(client: openai.OpenAI) -> None:
    answer = client.responses.parse(
        model="demo", input=QUESTION, temperature=0, max_output_tokens=400, text_format=Capital
    )
    assert answer.status == "completed" and isinstance(answer.output_parsed, Capital)
    assert answer.text is not None and answer.text.format is not None and answer.text.format.type == "json_schema"


def test_a_response_that_is_cut_off_is_incomplete(client: openai.OpenAI) -> None:
    answer = ask(client, max_output_tokens=2)
    assert answer.status == "incomplete" and answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"


@pytest.mark.parametrize("kind", ["web_search", "code_interpreter", "mcp"])
def test_hosted_tools_are_refused_by_name(client: openai.OpenAI, kind: str) -> None:
    with pytest.raises(openai.BadRequestError, match=kind):
        ask(client, tools=[{"type": kind}])
