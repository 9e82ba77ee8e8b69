"""A gateway without sockets: a ring that answers in process, and a client that speaks ASGI.

`FakeRing` is the transport that RingClient is given. What each request gets is decided by `script`, a function from
the Generate to the messages that come back; tests that want to decide later leave `script` empty and `push`.
"""

import asyncio
import functools
import json
from array import array
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import asynccontextmanager
from typing import Any

from quartet.http_gateway.app import build
from quartet.http_gateway.http.metrics import Metrics
from quartet.http_gateway.parsers.detection import detect
from quartet.http_gateway.ring.ring_client import RingClient
from quartet.http_gateway.routes.gateway import Gateway, Phase
from quartet.runtime.control import Abort, ControlCommand, FlushCache, Probe
from quartet.runtime.messages import Facts, Finish, Generate, Logprobs, Message, Reply, Text, Tokens, pack_ids
from quartet.runtime.model_files.embedding import Embedding
from quartet.runtime.model_files.model_info import ModelInfo
from tests.configs import resolved

VOCAB = 1000
SCHEDULER_COUNTERS = {
    "num_running_reqs": 2,
    "num_queue_reqs": 1,
    "num_used_tokens": 64,
    "token_usage": 0.5,
    "gen_throughput": 12.5,
    "cache_hit_rate": 0.25,
}

TEST_TIMEOUT_S = 120.0  # of a test that hangs, on a machine that is busy

Script = Callable[[Generate], list[Message]]


def asynchronous(test: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
    """Run a test in an event loop of its own."""

    @functools.wraps(test)
    def run(*args: Any, **fixtures: Any) -> None:
        asyncio.run(asyncio.wait_for(test(*args, **fixtures), TEST_TIMEOUT_S))

    return run


def floats(*values: float) -> bytes:
    return array("f", values).tobytes()


def step(rid: str, ids: Sequence[int] = (), text: str = "", **fields: Any) -> Text:
    """One step of a request, as the detokenizer sends it."""
    return Text(text=text, tokens=Tokens(rid=rid, ids=pack_ids(ids), weight_version="v1", **fields))


def words(*pieces: str) -> Script:
    """One token per piece, ids 1, 2, 3, …; the last one ends the request."""

    def script(generate: Generate) -> list[Message]:
        request = generate.request
        if request.params.max_new_tokens == 0:
            return [step(request.rid, prompt_tokens=3, finish=Finish(reason="length", length=0))]
        steps: list[Message] = []
        for i, piece in enumerate(pieces, start=1):
            finish = Finish(reason="stop", matched=i) if i == len(pieces) else None
            scored = Logprobs(ids=pack_ids([i]), values=floats(-0.5 * i)) if request.logprobs else None
            steps.append(
                step(request.rid, [i], piece, prompt_tokens=3, attempt=request.attempt, finish=finish, logprobs=scored)
            )
        return steps

    return script


def ends(finish: Finish) -> Script:
    return lambda generate: [step(generate.request.rid, finish=finish)]


def never_again(role: str) -> int:
    """The epoch of a role that was never started again."""
    return 0


class FakeRing:
    """Both ends of the gateway's transport; every message sent is kept in `sent`."""

    def __init__(self, script: Script | None = None) -> None:
        self.script = script
        self.sent: list[Any] = []
        self.answers_commands = True
        self._frames: asyncio.Queue[list[Message]] = asyncio.Queue()
        self._changed = asyncio.Event()

    def send(self, messages: Sequence[Message]) -> None:
        self.sent += messages
        self._changed.set()
        for message in messages:
            if isinstance(message, Generate) and self.script is not None:
                for answer in self.script(message):
                    self.push(answer)
            elif isinstance(message, ControlCommand) and self.answers_commands:
                self._answer(message)

    def _answer(self, command: ControlCommand) -> None:
        match command:
            case Abort():
                return
            case Probe():
                command.counters["scheduler"] = dict(SCHEDULER_COUNTERS)
                self.push(command)
            case FlushCache():
                self.push(Reply(id=command.id))
            case _:
                self.push(command)

    def push(self, *messages: Message) -> None:
        """One frame from the ring."""
        self._frames.put_nowait(list(messages))

    async def recv(self) -> list[Message]:
        return await self._frames.get()

    async def sent_of(self, kind: type, count: int = 1) -> list[Any]:
        """The messages of a kind that were sent, once there are so many."""
        while True:
            found = [message for message in self.sent if isinstance(message, kind)]
            if len(found) >= count:
                return found
            self._changed.clear()
            await self._changed.wait()


class FakeProgress:
    def __init__(self, age_s: float = 0.0, busy: bool = False, beats: int = 0) -> None:
        self.values = (age_s, busy, beats)

    def age_s(self) -> float:
        return self.values[0]

    def busy(self) -> bool:
        return self.values[1]

    def beats(self) -> int:
        return self.values[2]


class Answer:
    """A response as a client sees it."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes) -> None:
        self.status = status
        self.headers = headers
        self.body = body

    @property
    def text(self) -> str:
        return self.body.decode()

    def json(self) -> Any:
        return json.loads(self.body)

    def events(self) -> list[Any]:
        """The events of a stream; the last one must be [DONE] and is left out."""
        lines = [line for line in self.text.split("\n\n") if line]
        assert lines[-1] == "data: [DONE]", lines
        assert all(line.startswith("data: ") for line in lines), lines
        return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


class Call:
    """A request on its way. `chunk` waits for the next piece of the body, `answer` for the end."""

    def __init__(self, app: Any, scope: dict[str, Any], body: bytes, gone: asyncio.Event | None) -> None:
        self._requests = [{"type": "http.request", "body": body, "more_body": False}]
        self._sent: list[Any] = []
        self._chunks: asyncio.Queue[bytes] = asyncio.Queue()
        self._disconnected = gone or asyncio.Event()
        self._task = asyncio.create_task(app(scope, self._receive, self._send))

    async def _receive(self) -> Any:
        if self._requests:
            return self._requests.pop()
        await self._disconnected.wait()
        return {"type": "http.disconnect"}

    async def _send(self, message: Any) -> None:
        self._sent.append(message)
        if message["type"] == "http.response.body":
            self._chunks.put_nowait(message.get("body", b""))

    async def chunk(self) -> bytes:
        return await self._chunks.get()

    async def answer(self) -> Answer:
        await self._task
        if not self._sent:
            return Answer(0, {}, b"")  # nobody was there to be answered
        start, *rest = self._sent
        headers = {name.decode().lower(): value.decode("latin-1") for name, value in start["headers"]}
        return Answer(start["status"], headers, b"".join(message.get("body", b"") for message in rest))


class Client:
    """Calls an ASGI application directly."""

    def __init__(self, app: Any) -> None:
        self._app = app

    async def get(self, path: str, **options: Any) -> Answer:
        return await self.call("GET", path, **options)

    async def post(self, path: str, body: Any = None, **options: Any) -> Answer:
        return await self.call("POST", path, body, **options)

    async def call(self, method: str, target: str, body: Any = None, **options: Any) -> Answer:
        return await self.start(method, target, body, **options).answer()

    def start(
        self,
        method: str,
        target: str,
        body: Any = None,
        headers: dict[str, str] | None = None,
        gone: asyncio.Event | None = None,
    ) -> Call:
        """Send a request (bytes as they are, anything else as JSON); the client leaves when `gone` is set."""
        path, _, query = target.partition("?")
        raw = body if isinstance(body, bytes) else b"" if body is None else json.dumps(body).encode()
        given = {"host": "127.0.0.1:30000", "content-type": "application/json", **(headers or {})}
        scope = {
            "type": "http",
            "http_version": "1.1",
            "method": method,
            "path": path,
            "raw_path": path.encode(),
            "query_string": query.encode(),
            "headers": [(name.lower().encode(), value.encode("latin-1")) for name, value in given.items()],
            "client": ("127.0.0.1", 40466),
            "server": ("127.0.0.1", 30000),
            "scheme": "http",
            "root_path": "",
        }
        return Call(self._app, scope, raw, gone)


class Served:
    """A gateway that is up, its ring, and a client."""

    def __init__(self, ring: FakeRing, gateway: Gateway) -> None:
        self.ring = ring
        self.gateway = gateway
        self.client = Client(build(gateway))


@asynccontextmanager
async def served(
    script: Script | None = None, limit: int = 100, embedding: Embedding | None = None, **settings: Any
) -> AsyncIterator[Served]:
    """A gateway with these settings on a ring with this script; `embedding`: of a model that embeds."""
    transport = FakeRing(script)
    config = resolved(model_path="qwen/qwen2.5-0.5b-instruct", **settings)
    metrics = Metrics(config.name, never_again)
    ring = RingClient(transport, transport, limit, metrics)
    listening = asyncio.create_task(ring.listen())
    model = ModelInfo(
        path="/models/x",
        architecture="Qwen2ForCausalLM",
        model_type="qwen2",
        vocab_size=VOCAB,
        hidden_size=4,
        context_length=512,
        eos_ids=[2],
        config={},
        is_embedding=config.is_embedding or embedding is not None,
        embedding=embedding or (Embedding(pooling=("lasttoken",), normalize=True) if config.is_embedding else None),
    )
    facts = Facts(max_total_num_tokens=128, max_req_input_len=120, context_length=512, vocab_size=VOCAB)
    config = detect(config, model, {}).applied(config)
    gateway = Gateway(config, model, facts, ring, metrics, FakeProgress(), phase=Phase.UP)
    try:
        yield Served(transport, gateway)
    finally:
        for stop in gateway.at_drain:
            stop()
        gateway.files.close()
        listening.cancel()
