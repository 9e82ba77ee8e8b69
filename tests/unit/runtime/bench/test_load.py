"""Load on a server whose timing is known, in time that is no clock's: the whole path but the network is real."""

import asyncio
import json

import httpx
import pytest

from quartet.runtime.bench.apis import Settings, api_named
from quartet.runtime.bench.load import NO_USAGE, Sender, by_concurrency, by_rate
from quartet.runtime.bench.records import History, Record, Turn
from quartet.runtime.bench.statistics import summarize
from tests import virtual_time

TTFT_S, TPOT_S = 0.5, 0.125
TURN = Turn("Hi there", output_tokens=5, ids=(7, 8))


def data(body: object) -> bytes:
    return b"data: " + (body if isinstance(body, bytes) else json.dumps(body).encode()) + b"\n\n"


class Stream(httpx.AsyncByteStream):
    """A first token after TTFT_S and each further one after TPOT_S."""

    def __init__(self, server: "SimulatedServer", events: list[bytes]) -> None:
        self._server = server
        self._events = events

    async def __aiter__(self):
        loop = asyncio.get_running_loop()
        self._server.running += 1
        self._server.most_running = max(self._server.most_running, self._server.running)
        self._server.began.append(loop.time())
        for i, event in enumerate(self._events):
            await asyncio.sleep(TPOT_S if i else TTFT_S)
            middle = len(event) // 2  # parts are cut anywhere
            yield event[:middle]
            yield event[middle:]
        yield data(b"[DONE]")
        while self._server.stays_open:
            await asyncio.sleep(1)
            yield b": ping\n\n"
        self._server.running -= 1


class SimulatedServer:
    """Answers all three APIs with as many tokens as are asked for."""

    def __init__(self, *, usage: bool = True, refuse: int = 0, give_up: bool = False, stays_open: bool = False) -> None:
        self.bodies: list[dict] = []
        self.began: list[float] = []
        self.running = self.most_running = 0
        self._usage = usage
        self._refuse = refuse  # so many requests first
        self._give_up = give_up
        self.stays_open = stays_open  # behind the last event

    async def __call__(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(request.content)
        self.bodies.append(body)
        if len(self.bodies) <= self._refuse:
            return httpx.Response(503, json={"error": {"message": "the queue is full"}})
        count = body.get("max_tokens") or body["sampling_params"]["max_new_tokens"]
        events = [data(self._chunk(request.url.path, i, count)) for i in range(1, count + 1)]
        if self._give_up:
            events[-1] = data({"error": {"message": "the server ran out of memory"}})
        elif self._usage and request.url.path != "/generate":
            usage = {"prompt_tokens": 9, "completion_tokens": count, "prompt_tokens_details": {"cached_tokens": 4}}
            events[-1] += data({"choices": [], "usage": usage})
        return httpx.Response(200, stream=Stream(self, events))

    def _chunk(self, path: str, i: int, count: int) -> dict:
        if path == "/generate":
            meta = {"prompt_tokens": 9, "completion_tokens": i, "cached_tokens": 4}
            return {"text": "word " * i, "output_ids": list(range(i)), "meta_info": meta if self._usage else {}}
        if path == "/v1/completions":
            return {"choices": [{"text": "word "}], "usage": None}
        thinks = {"reasoning_content": "hm "} if i == 1 else {"content": "word "}
        return {"choices": [{"delta": thinks}]}

    def sender(self, api: str = "native", turns: int = 1, timeout_s: float = 60) -> Sender:
        client = httpx.AsyncClient(transport=httpx.MockTransport(self), base_url="http://server")
        return Sender(client, api_named(api, turns), Settings("m"), timeout_s)


def records_of(load) -> list[Record]:
    """What is noted by `load(note)`, a coroutine."""
    records: list[Record] = []
    virtual_time.run(load(records.append))
    return records


@pytest.mark.parametrize("api", ["native", "openai", "openai-chat"])
def test_times_are_those_of_the_arrivals_and_tokens_those_that_the_server_reports(api):
    server = SimulatedServer()
    record = virtual_time.run(server.sender(api)(History(), TURN))
    assert record.error == ""
    assert (record.ttft, record.tpot, record.e2e) == (TTFT_S, TPOT_S, TTFT_S + 4 * TPOT_S)
    assert record.gaps == [TPOT_S] * 4
    assert (record.prompt_tokens, record.cached_tokens, record.completion_tokens) == (9, 4, 5)


def test_a_number_of_requests_run_at_once_and_the_next_begin_when_they_end():
    server = SimulatedServer()
    records = records_of(lambda note: by_concurrency([(TURN,)] * 5, server.sender(), note, 2))
    whole = TTFT_S + 4 * TPOT_S
    assert server.began == [0, 0, whole, whole, 2 * whole]
    assert server.most_running == 2
    assert summarize([records], {}).concurrency == pytest.approx(5 / 3)


def test_requests_begin_at_their_moments_whether_or_not_others_have_ended():
    server = SimulatedServer()
    times = [0.0, 0.1, 0.2, 7.0]
    records_of(lambda note: by_rate([(TURN,)] * 4, server.sender(), note, times, None))
    assert server.began == pytest.approx(times)
    assert server.most_running == 3


def test_a_bound_on_requests_at_once_holds_back_what_comes_too_soon():
    server = SimulatedServer()
    records_of(lambda note: by_rate([(TURN,)] * 2, server.sender(), note, [0.0, 0.1], 1))
    assert server.began == [0, TTFT_S + 4 * TPOT_S]


def test_refusals_are_errors_with_their_reason_and_have_no_times():
    server = SimulatedServer(refuse=1)
    refused, done = records_of(lambda note: by_concurrency([(TURN,)] * 2, server.sender(), note, 1))
    assert (refused.error, refused.ttft) == ("HTTP 503: the queue is full", None)
    assert done.error == ""


def test_an_answer_that_the_server_gives_up_is_an_error():
    record = virtual_time.run(SimulatedServer(give_up=True).sender()(History(), TURN))
    assert record.error == "the server ran out of memory"


@pytest.mark.parametrize("api", ["native", "openai", "openai-chat"])
def test_an_answer_without_usage_is_an_error_for_nothing_is_estimated(api):
    record = virtual_time.run(SimulatedServer(usage=False).sender(api)(History(), TURN))
    assert record.error == NO_USAGE


@pytest.mark.parametrize("api", ["native", "openai", "openai-chat"])
def test_an_answer_ends_with_its_last_event_though_the_connection_stays_open(api):
    server = SimulatedServer(stays_open=True)
    [record] = records_of(lambda note: by_concurrency([[TURN]], server.sender(api), note, 1))
    assert (record.error, record.ended_at - record.sent_at) == ("", TTFT_S + 5 * TPOT_S - TPOT_S)


@pytest.mark.parametrize("event", [b'{"choices": null}', b'{"choices": [{"delta": null, "text": "x"}]}'])
@pytest.mark.parametrize("api", ["openai", "openai-chat"])
def test_what_servers_write_as_null_is_nothing(api, event):
    assert api_named(api, 1).reader()(event).error == ""


@pytest.mark.parametrize("api", ["native", "openai", "openai-chat"])
def test_an_error_may_be_its_text(api):
    assert api_named(api, 1).reader()(b'{"error": "out of memory"}').error == "out of memory"


def test_a_request_that_takes_too_long_is_an_error():
    record = virtual_time.run(SimulatedServer().sender(timeout_s=0.75)(History(), TURN))
    assert record.error == "no whole answer within 0.75 s"


def test_a_lost_connection_is_an_error():
    def lose(request: httpx.Request) -> httpx.Response:
        raise httpx.ReadError("gone")

    client = httpx.AsyncClient(transport=httpx.MockTransport(lose), base_url="http://server")
    record = virtual_time.run(Sender(client, api_named("native", 1), Settings("m"), 9)(History(), TURN))
    assert record.error == "ReadError: gone"


def prompts_of(api: str) -> list:
    server = SimulatedServer()
    session = (Turn("One", 2, (1, 2)), Turn("Two", 2, (3,)))
    records_of(lambda note: by_concurrency([session], server.sender(api, turns=2), note, 1))
    return [body.get("input_ids") or body.get("prompt") or body.get("messages") for body in server.bodies]


def test_later_turns_begin_with_all_that_was_said_before():
    assert prompts_of("native") == [[1, 2], [1, 2, 0, 1, 3]]
    assert prompts_of("openai") == ["One", "Oneword word \nTwo"]
    first, second = prompts_of("openai-chat")
    assert first == [{"role": "user", "content": "One"}]
    assert second == [*first, {"role": "assistant", "content": "hm word "}, {"role": "user", "content": "Two"}]


def test_a_session_ends_with_a_turn_that_fails():
    server = SimulatedServer(refuse=1)
    records = records_of(lambda note: by_concurrency([(TURN, TURN)], server.sender(), note, 1))
    assert [record.error for record in records] == ["HTTP 503: the queue is full"]
