"""The tokenizer and detokenizer as processes; the test stands at their other ends as gateway and scheduler."""

import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import zmq

from quartet.runtime import sockets
from quartet.runtime.control import Abort, Detokenize, FlushCache, Probe, Tokenize
from quartet.runtime.messages import Finish, Generate, Message, Request, Tokens, pack_ids, unpack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.service import EXIT_STARTUP, Boot, Ready
from tests.configs import resolved
from tests.servers import started
from tests.tokenizers_to_try import byte_level, save
from tests.wrong_messages import wrong_messages

TOKENIZER = byte_level()
CONFIG = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 512, "hidden_size": 8}


class Service:
    """One service process, the socket that feeds it and the one that hears it."""

    def __init__(self, role: str, model: Path, run_dir: Path) -> None:
        self.run_dir = run_dir
        addresses = [sockets.endpoint(str(run_dir), name, 0) for name in (role, f"{role}.out")]
        self._heard = sockets.Inbox(addresses[1])
        self.process, ready = self._start(role, model, *addresses)
        with ready:
            self.ready = msgspec.json.decode(ready.readline(), type=Ready)
        self._address = addresses[0]
        self._feed = sockets.Outbox(addresses[0])

    def _start(self, role: str, model: Path, inbox: str, outbox: str) -> tuple[subprocess.Popen[bytes], Any]:
        ready_read, ready_write = os.pipe()
        lifeline, self._lifeline = os.pipe()
        boot = Boot(
            role=role,
            run_dir=str(self.run_dir),
            inbox=inbox,
            outbox=outbox,
            config=resolved(model_path=str(model)),
            ready_fd=ready_write,
            lifeline_fd=lifeline,
            parent_pid=os.getpid(),
        )
        file = self.run_dir / f"{role}.boot"
        file.write_bytes(msgspec.msgpack.encode(boot))
        process = started(f"{role}_service.main", file, ready_write, lifeline)
        os.close(ready_write)
        os.close(lifeline)
        return process, open(ready_read, "rb")

    def send(self, *messages: Message) -> None:
        self._feed.send(messages)

    def send_bytes(self, frame: bytes) -> None:
        with zmq.Context.instance().socket(zmq.PUSH) as socket:
            socket.connect(self._address)
            socket.send(frame)

    def hear(self, count: int) -> list[Any]:
        """The next messages, in order."""
        heard: list[Any] = []
        while len(heard) < count:
            more = self._heard.recv(timeout_s=120)
            assert more, f"heard {len(heard)} of {count} messages"
            heard += more
        assert len(heard) == count
        return heard

    def hear_some(self) -> list[Any]:
        """At least one message."""
        heard = self._heard.recv(timeout_s=120)
        assert heard, "silence"
        return heard

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._lifeline)
        self._feed.close()
        self._heard.close()


@pytest.fixture
def start() -> Iterator[Callable[[str, Path], Service]]:
    services: list[Service] = []
    with tempfile.TemporaryDirectory(prefix="q") as run_dir:

        def begin(role: str, model: Path) -> Service:
            services.append(Service(role, model, Path(run_dir)))
            return services[-1]

        yield begin
        for service in services:
            service.end()


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(CONFIG))
    return save(TOKENIZER, tmp_path)


def generate(rid: str, text: str, **params: Any) -> Generate:
    return Generate(request=Request(rid=rid, params=SamplingParams(**params)), text=text)


def test_text_comes_back_as_it_went_in(start: Callable[..., Service], model: Path) -> None:
    tokenizer, detokenizer = start("tokenizer", model), start("detokenizer", model)
    prompts = {f"r{n}": f"prompt {n}: 你好 😀 naïve\n" * (1 + n % 5) for n in range(100)}
    for at in range(0, 100, 10):
        tokenizer.send(*(generate(rid, prompts[rid]) for rid in list(prompts)[at : at + 10]))
    for tokenized in tokenizer.hear(100):
        ids = tokenized.prompt_ids
        first, rest = ids[:8], ids[8:]
        detokenizer.send(Tokens(rid=tokenized.request.rid, request=tokenized.request, ids=first))
        detokenizer.send(Tokens(rid=tokenized.request.rid, ids=rest, finish=Finish(reason="length", length=1)))
    answers = dict.fromkeys(prompts, "")
    for message in detokenizer.hear(200):
        answers[message.tokens.rid] += message.text
    assert answers == prompts


def test_what_is_not_theirs_passes_in_order(start: Callable[..., Service], model: Path) -> None:
    for service in (start("tokenizer", model), start("detokenizer", model)):
        service.send(FlushCache(id="1"), Abort(rid="a"))
        service.send(Probe(counters={"gateway": {}}), FlushCache(id="2"))
        first, abort, probe, last = service.hear(4)
        assert (first.id, abort.rid, last.id) == ("1", "a", "2")
        assert len(probe.counters) == 2


def test_bytes_that_are_no_frame_are_dropped_and_the_service_goes_on(
    start: Callable[..., Service], model: Path
) -> None:
    for service in (start("tokenizer", model), start("detokenizer", model)):
        for frame in (b"", b"\xc1", b"\x91" * 5000, msgspec.msgpack.encode([{"type": "no such"}]), os.urandom(200)):
            service.send_bytes(frame)
        service.send(FlushCache(id="alive"))
        assert [message.id for message in service.hear(1)] == ["alive"]
        assert service.process.poll() is None


def test_wrong_messages_end_no_service_and_the_right_ones_among_them_are_answered(
    start: Callable[..., Service], model: Path
) -> None:
    tokenizer, detokenizer = start("tokenizer", model), start("detokenizer", model)
    for service in (tokenizer, detokenizer):
        for number, message in enumerate(wrong_messages(1, 200)):
            service.send(message, FlushCache(id=f"alive {number}"))
        heard: list[str] = []
        while not heard or heard[-1] != "alive 199":
            heard += [m.id for m in service.hear_some() if isinstance(m, FlushCache) and m.id.startswith("alive ")]
        assert heard == [f"alive {number}" for number in range(200)]
        assert service.process.poll() is None


def test_commands_are_answered_by_the_service_they_are_for(start: Callable[..., Service], model: Path) -> None:
    tokenizer, detokenizer = start("tokenizer", model), start("detokenizer", model)
    tokenizer.send(Tokenize(id="t", texts=["hi"]), Detokenize(id="d", ids=[b""]))
    reply, passed = tokenizer.hear(2)
    detokenizer.send(reply, passed)
    assert [message.id for message in detokenizer.hear(2)] == ["t", "d"]
    assert reply.body == {"tokens": [pack_ids(TOKENIZER.encode("hi").ids)]}


def test_a_bad_request_is_refused_and_its_neighbours_are_served(start: Callable[..., Service], model: Path) -> None:
    tokenizer, detokenizer = start("tokenizer", model), start("detokenizer", model)
    tokenizer.send(generate("a", "ok"), generate("b", "x", stop_regex="("), generate("c", ""), generate("d", "ok"))
    a, b, c, d = tokenizer.hear(4)
    assert unpack_ids(a.prompt_ids) == unpack_ids(d.prompt_ids)
    detokenizer.send(b, c)
    assert [text.tokens.finish.status for text in detokenizer.hear(2)] == [400, 400]


def test_neither_service_maps_torch(start: Callable[..., Service], model: Path) -> None:
    for service in (start("tokenizer", model), start("detokenizer", model)):
        assert "torch" not in Path(f"/proc/{service.process.pid}/maps").read_text()


def test_a_model_without_a_tokenizer_is_told_to_the_launcher(start: Callable[..., Service], tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes(msgspec.json.encode(CONFIG))
    service = start("detokenizer", tmp_path)
    assert "no tokenizer.json in" in service.ready.error
    assert service.process.wait(timeout=120) == EXIT_STARTUP
