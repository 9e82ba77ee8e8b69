"""The scheduler as a process of its own, with a fake worker: boot, facts, requests, aborts, death with its parent."""

import json
import os
from array import array
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from quartet.runtime.control import Abort, FlushCache, Probe
from quartet.runtime.messages import Facts, Message, Reply, Request, Tokenized, Tokens, pack_ids, unpack_ids
from quartet.runtime.process.progress import ProgressReader
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.service import Boot, Ready
from quartet.runtime.sockets import Inbox, Outbox, endpoint
from tests.configs import resolved
from tests.fakes import next_token
from tests.servers import started

VOCABULARY = 1000
WAIT_S = 120.0


class Process:
    """A scheduler process and the two ends of the ring that it hangs between."""

    def __init__(self, run_dir: Path, **settings: object) -> None:
        model = run_dir / "model"
        model.mkdir()
        (model / "config.json").write_text(
            json.dumps({"architectures": ["Fake"], "vocab_size": VOCABULARY, "max_position_embeddings": 4096})
        )
        self.run_dir = str(run_dir)
        self.inbox = Inbox(endpoint(self.run_dir, "detokenizer", 0))
        ready_read, ready_write = os.pipe()
        lifeline_read, self.lifeline = os.pipe()
        boot = Boot(
            role="scheduler",
            run_dir=self.run_dir,
            inbox=endpoint(self.run_dir, "scheduler", 0),
            outbox=endpoint(self.run_dir, "detokenizer", 0),
            config=resolved(model_path=str(model), **settings),  # type: ignore[arg-type]
            ready_fd=ready_write,
            lifeline_fd=lifeline_read,
            parent_pid=os.getpid(),
        )
        boot_file = run_dir / "boot"
        boot_file.write_bytes(msgspec.msgpack.encode(boot))
        self.child = started("tests.fake_scheduler", boot_file, ready_write, lifeline_read)
        os.close(ready_write)
        os.close(lifeline_read)
        with os.fdopen(ready_read) as ready:
            assert msgspec.json.decode(ready.readline(), type=Ready).error == ""
        self.outbox = Outbox(boot.inbox)
        self._waiting: list[Message] = []

    def send(self, *messages: Message) -> None:
        self.outbox.send(messages)

    def receive(self) -> Message:
        """The next message, in order."""
        if not self._waiting:
            self._waiting = self.inbox.recv(WAIT_S)
            assert self._waiting, "the scheduler sent nothing"
        return self._waiting.pop(0)

    def tokens_until_finish(self, rid: str) -> list[Tokens]:
        seen: list[Tokens] = []
        while not (seen and seen[-1].finish):
            message = self.receive()
            assert isinstance(message, Tokens)
            if message.rid == rid:
                seen.append(message)
        return seen

    def close(self) -> None:
        os.close(self.lifeline)
        self.child.wait(WAIT_S)
        self.inbox.close()
        self.outbox.close()


@pytest.fixture
def process(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Process]:
    process = Process(tmp_path_factory.mktemp("r"))
    yield process
    process.close()


def tokenized(rid: str, ids: list[int], **params: object) -> Tokenized:
    return Tokenized(
        request=Request(rid=rid, params=SamplingParams(**params)),  # type: ignore[arg-type]
        prompt_ids=pack_ids(ids),
    )


def test_a_request_runs_through_a_real_scheduler_process(process: Process) -> None:
    assert isinstance(facts := process.receive(), Facts)
    assert facts.max_req_input_len == 4095
    process.send(tokenized("a", [5, 6, 7], max_new_tokens=4))
    messages = process.tokens_until_finish("a")
    expected = array("i", [5, 6, 7])
    for _ in range(4):
        expected.append(next_token(expected, VOCABULARY))
    assert [token for m in messages for token in unpack_ids(m.ids)] == list(expected[3:])
    assert messages[0].request is not None and unpack_ids(messages[0].prompt_tail) == array("i", [5, 6, 7])
    assert all(m.request is None for m in messages[1:])
    assert messages[-1].finish is not None and messages[-1].finish.reason == "length"


def test_commands_are_answered_and_strangers_forwarded(process: Process) -> None:
    assert isinstance(process.receive(), Facts)
    stranger = Reply(id="s", message="not mine")
    process.send(stranger, FlushCache(id="f"), Probe(id="p"))
    assert isinstance(process.receive(), Facts), "what it serves is said in front of every reply"
    assert process.receive() == stranger
    assert isinstance(reply := process.receive(), Reply) and (reply.id, reply.status) == ("f", 200)
    assert isinstance(probe := process.receive(), Probe)
    assert probe.counters["scheduler"]["num_running_reqs"] == 0


def test_an_abort_ends_a_running_request_with_one_last_message(process: Process) -> None:
    assert isinstance(process.receive(), Facts)
    process.send(tokenized("long", [5], max_new_tokens=4000))
    assert isinstance(process.receive(), Tokens)
    process.send(Abort(rid="long"))
    last = process.tokens_until_finish("long")[-1]
    assert last.finish is not None and last.finish.reason in ("abort", "length")
    process.send(Probe(id="p"))
    assert isinstance(probe := process.receive(), Probe), "a message behind the last one"
    assert probe.counters["scheduler"]["num_used_tokens"] == 0


def test_the_progress_word_can_be_read_from_outside(process: Process) -> None:
    reader = ProgressReader(process.run_dir, "scheduler")
    assert reader.beats() >= 1
    assert reader.age_s() < WAIT_S


def test_the_process_dies_with_its_lifeline(tmp_path_factory: pytest.TempPathFactory) -> None:
    process = Process(tmp_path_factory.mktemp("r"))
    process.close()
    assert process.child.returncode == 1
