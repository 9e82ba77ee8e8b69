"""Wrong messages of every kind, through each service's loop: nothing escapes, and every other request is answered."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.service import NO_BEGINNING, Detokenizer
from quartet.runtime.control import (
    Abort,
    ContinueGeneration,
    PauseGeneration,
    Probe,
    ResumeMemory,
    SlowDown,
    StopProfile,
)
from quartet.runtime.guard import EVERY_EPOCH, Announced, Guard, Malformed
from quartet.runtime.messages import (
    ATTEMPT_BITS,
    Drafts,
    Facts,
    Finish,
    Generate,
    Logprobs,
    Message,
    Request,
    Restarted,
    Text,
    Tokenized,
    Tokens,
    pack_ids,
)
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.control import profile as control_profile
from quartet.tokenizer_service.encode import Encoder
from tests import checkpoints
from tests.live import Live
from tests.rig import PROMPT, Rig
from tests.stepper import expected_output, tokenized
from tests.tokenizers_to_try import byte_level
from tests.unit.http_gateway.harness import asynchronous, served, step
from tests.wrong_messages import MESSAGES, RID, wrong_messages

TOKENIZER = byte_level()
ROUNDS, TOGETHER = 20, 2 * len(MESSAGES)
HELLO = TOKENIZER.encode("Hello there, all of you.").ids
NOBODY = Announced(lambda role: 0)  # nothing was ever started again
LENGTH = Finish(reason="length", length=len(HELLO))


class Recorder:
    """Stands in for torch's profiler, which crashes at the end of a process that still records."""

    def __init__(self, **options: Any) -> None: ...

    def start(self) -> None: ...

    def stop(self) -> None: ...

    def export_chrome_trace(self, file: str) -> None: ...


@pytest.fixture(autouse=True)
def no_profiler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(control_profile, "profile", Recorder)


def rounds(test: Callable[..., Any]) -> Callable[..., Any]:
    return pytest.mark.parametrize("seed", range(ROUNDS))(test)


def batches(seed: int) -> Iterator[tuple[Message, bool]]:
    """Each wrong message, and whether it stands alone in its frame."""
    for number, message in enumerate(wrong_messages(seed, TOGETHER)):
        yield message, number % 2 == 0


def request(rid: str, **params: Any) -> Request:
    return Request(rid=rid, params=SamplingParams(**params))


def own(messages: list[Message], rid: str) -> list[Any]:
    """What was said of a request, in whatever kind of message."""
    return [m for m in messages if getattr(getattr(m, "tokens", m), "rid", None) == rid]


# the tokenizer


@rounds
def test_the_tokenizer_survives_wrong_messages_amid_others(seed: int) -> None:
    encoder = Encoder(TOKENIZER, hidden_size=4, context_length=500)
    guard = Guard("tokenizer", NOBODY, encoder.give_up)
    for message, alone in batches(seed):
        before, after = Generate(request=request("a"), text="Hello"), Generate(request=request("b"), text="you")
        out = guard.batch(encoder, [message] if alone else [before, message, after])
        if not alone:
            tokenized = [m for m in out if isinstance(m, Tokenized)]  # replies to long texts may come among them
            assert [m.prompt_ids for m in own(out, "a") or tokenized[:1]] == [pack_ids(TOKENIZER.encode("Hello").ids)]
            assert tokenized[-1].request.rid == "b"


# the detokenizer


@rounds
def test_the_detokenizer_survives_wrong_messages_amid_others(seed: int) -> None:
    detokenizer = Detokenizer(Vocabulary(TOKENIZER))
    guard = Guard("detokenizer", NOBODY, detokenizer.give_up)
    for message, alone in batches(seed):
        out: list[Message] = []
        first = Tokens(rid="a", request=request("a"), ids=pack_ids(HELLO[:3]))
        last = Tokens(rid="a", ids=pack_ids(HELLO[3:]), finish=LENGTH)
        for frame in [[first], [message], [last]] if alone else [[first, message, last]]:
            out += guard.batch(detokenizer, frame)
        texts = own(out, "a")
        assert "".join(text.text for text in texts) == "Hello there, all of you.", message
        assert texts[-1].tokens.finish == LENGTH
        assert len([m for m in own(out, RID) if isinstance(m, Text) and m.tokens.finish]) <= 1


MALFORMED_TOKENS = {
    "ids of three bytes": {"ids": b"abc"},
    "negative ids": {"ids": pack_ids([-1])},
    "a prompt tail of three bytes": {"request": request("r"), "prompt_tail": b"abc"},
    "short logprobs": {"ids": pack_ids([3, 4]), "logprobs": Logprobs(ids=pack_ids([3, 4]), values=bytes(4))},
    "logprobs of other tokens": {"ids": pack_ids([3]), "logprobs": Logprobs(ids=b"", values=b"")},
    "a bad stop_regex": {"request": request("r", stop_regex="(")},
    "resumed ids of three bytes": {"request": Request(rid="r", params=SamplingParams(), resume_ids=b"abc")},
    "an attempt that nobody counts": {"attempt": 10**9},
    "an epoch that nobody announced": {"request": Request(rid="r", params=SamplingParams(), epoch=10**9)},
    "another request": {"request": request("q")},
    "half a hidden state": {"hidden_states": bytes(6), "hidden_size": 1},
    "hidden states without a size": {"hidden_states": bytes(8)},
    "half a number of a vector": {"vector": b"abc"},
    "words without weights": {"vector": bytes(8), "vector_ids": pack_ids([3])},
    "a prompt filled up for ever": {"request": Request(rid="r", params=SamplingParams(), fill_to=1 << 40)},
    "a million right drafts": {"drafts": Drafts(proposed=10**6, correct=10**6)},
    "a negative count": {"prompt_tokens": -1},
}


@pytest.mark.parametrize("fault", MALFORMED_TOKENS)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("begun", [False, True])
def test_malformed_tokens_end_their_request_once_with_500(fault: str, last: bool, begun: bool) -> None:
    detokenizer = Detokenizer(Vocabulary(TOKENIZER))
    guard = Guard("detokenizer", NOBODY, detokenizer.give_up)
    fields = MALFORMED_TOKENS[fault]
    attempt = fields.get("attempt", 0)
    out = guard.batch(detokenizer, [Tokens(rid="r", request=request("r"), ids=pack_ids([3]))]) if begun else []
    bad = Tokens(rid="r", finish=LENGTH if last else None, **fields)
    out += guard.batch(detokenizer, [bad, Tokens(rid="r", ids=pack_ids([4])), Tokens(rid="r", finish=LENGTH)])
    ends = [m.tokens for m in own(out, "r") if isinstance(m, Text) and m.tokens.finish is not None]
    assert ends[0].finish.status == 500 and ends[0].attempt == attempt
    if not last:  # what the scheduler still sends until it hears of the end is dropped
        assert len(ends) == 1
        assert [m for m in out if isinstance(m, Abort)] == [Abort(rid="r", exact=True, attempt=attempt)]
    assert guard.failed == 1
    assert not detokenizer._streams and not detokenizer._stopped


def test_an_end_without_its_beginning_is_an_error() -> None:
    detokenizer = Detokenizer(Vocabulary(TOKENIZER))
    [text] = detokenizer.step([Tokens(rid="r", ids=pack_ids([3]), finish=LENGTH)])
    assert isinstance(text, Text)
    assert text.tokens.finish == Finish.internal(NO_BEGINNING) and text.tokens.ids == b""


@pytest.mark.parametrize("reason", ["error", "abort"])
def test_the_end_of_a_request_that_never_ran_passes_as_it_is(reason: Any) -> None:
    finish = Finish(reason=reason, message="no", status=400)
    [text] = Detokenizer(Vocabulary(TOKENIZER)).step([Tokens(rid="r", finish=finish)])
    assert isinstance(text, Text) and text.tokens.finish == finish


def test_an_epoch_that_nobody_announced_ends_no_other_stream() -> None:
    detokenizer = Detokenizer(Vocabulary(TOKENIZER))
    guard = Guard("detokenizer", NOBODY, detokenizer.give_up)
    guard.batch(detokenizer, [Tokens(rid="a", request=request("a"), ids=pack_ids(HELLO[:3]))])
    forged = Request(rid="x", params=SamplingParams(), epoch=10**9)
    facts = msgspec.structs.replace(next(m for m in MESSAGES if isinstance(m, Facts)), epoch=10**9)
    guard.batch(detokenizer, [Tokens(rid="x", request=forged, ids=pack_ids([3])), facts])
    out = guard.batch(detokenizer, [Tokens(rid="a", ids=pack_ids(HELLO[3:]), finish=LENGTH)])
    out += guard.batch(detokenizer, [Tokens(rid="b", request=request("b"), ids=pack_ids(HELLO), finish=LENGTH)])
    assert "".join(m.text for m in out if isinstance(m, Text)).endswith(" there, all of you.Hello there, all of you.")


# the scheduler


def disturbing(message: Message) -> bool:
    """A command that rightly does to others what it says."""
    return isinstance(message, PauseGeneration | SlowDown) or (isinstance(message, Abort) and message.rid != RID)


@rounds
def test_the_scheduler_survives_wrong_messages_amid_others(
    seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SGLANG_TORCH_PROFILER_DIR", str(tmp_path))
    rig = Rig()
    rig.scheduler.guard = Guard("scheduler", NOBODY, rig.scheduler.give_up)
    for number, (message, alone) in enumerate(batches(seed)):
        if disturbing(message) or getattr(message, "ends_requests", False):
            continue
        a, b = tokenized(f"a{number}", PROMPT, 3), tokenized(f"b{number}", PROMPT, 3)
        rig.outbox.frames.clear()
        for frame in [[a], [message], [b]] if alone else [[a, message, b]]:
            rig.inbox.put(*frame)
            rig.scheduler.step()
        for _ in range(600):
            rig.time += 1.0
            rig.scheduler.step()
            if rig.scheduler.idle:
                break
        for other in (a, b):
            said = rig.tokens(other.request.rid)
            ids = [id for m in said for id in memoryview(m.ids).cast("i")]
            assert ids == expected_output(PROMPT, 3) and said[-1].finish is not None, message
        rig.inbox.put(Abort(rid=RID, exact=True), Abort(abort_all=True))
        rig.scheduler.step()
        assert len([m for m in rig.tokens(RID) if m.finish]) <= 2, message  # of itself, and of one that it displaced
        rig.scheduler.planner.check_invariants()
    rig.inbox.put(StopProfile())  # a recording under way when the interpreter ends makes torch end it with SIGSEGV
    rig.scheduler.step()


@pytest.mark.parametrize("seed", range(4))
def test_a_scheduler_with_a_model_survives_wrong_commands(seed: int, live: Live) -> None:
    before = live.logits(PROMPT)
    for message in wrong_messages(seed, TOGETHER):
        if disturbing(message) or not hasattr(message, "methods"):
            continue
        live.send(message)  # type: ignore[arg-type]
        live.step(3)
    live.send(ContinueGeneration(id="go on"), ResumeMemory(id="wake"), tokenized("a", [3, 4], 3))
    live.run()
    assert live.finish("a") is not None
    assert live.logits(PROMPT) == before


@pytest.fixture
def live(tmp_path: Any) -> Live:
    model = checkpoints.version_model(tmp_path / "model", 100)
    return Live(model, tmp_path, enable_memory_saver=True, enable_weights_cpu_backup=True)


def test_a_gateway_that_nobody_started_ends_no_request() -> None:
    rig = Rig()
    rig.scheduler.guard = Guard("scheduler", NOBODY, rig.scheduler.give_up)
    rig.inbox.put(tokenized("a", PROMPT, 3), Restarted(role="gateway", least_attempt=10**9))
    rig.run()
    rig.inbox.put(tokenized("b", PROMPT, 3))
    rig.run()
    assert [rig.tokens(rid)[-1].finish for rid in "ab"] == [Finish(reason="length", length=3)] * 2


# the gateway


@rounds
@asynchronous
async def test_the_gateway_survives_wrong_messages_amid_others(seed: int) -> None:
    async with served() as server:
        server.gateway.ring.guard = Guard("gateway", NOBODY, server.gateway.ring._give_up)
        for number, (message, alone) in enumerate(batches(seed)):
            if isinstance(message, Restarted):  # rightly believed where it is well formed: requests are sent again
                continue
            rid = f"a{number}"
            call = server.client.start("POST", "/generate", {"text": "hi", "rid": rid})
            sent = (await server.ring.sent_of(Generate, 1 + number_of(server.ring.sent, Generate, rid)))[-1]
            first, last = step(sent.request.rid, [3], "x"), step(sent.request.rid, [4], "y", finish=FINISH)
            for frame in [[first], [message], [last]] if alone else [[first, message, last]]:
                server.ring.push(*frame)
            answer = await call.answer()
            assert (answer.status, answer.json()["text"]) == (200, "xy"), message
            assert (await server.client.get("/readyz")).status in (200, 503)


FINISH = Finish(reason="stop", matched=4)


def number_of(sent: list[Any], kind: type, rid: str) -> int:
    """How many of a kind were sent before this request."""
    return sum(isinstance(m, kind) and m.request.rid != rid for m in sent)


@pytest.mark.parametrize(
    "fields",
    [
        {"ids": b"abc"},
        {"ids": pack_ids([-1])},
        {"logprobs": Logprobs(ids=b"", values=bytes(4))},
        {"drafts": Drafts(proposed=10**6, correct=10**6)},
        {"hidden_states": bytes(8)},
    ],
)
@pytest.mark.parametrize("stream", [False, True])
@asynchronous
async def test_a_wrong_text_ends_its_request_with_500_and_aborts_it(fields: dict[str, Any], stream: bool) -> None:
    async with served() as server:
        body = {"text": "hi", "rid": "r", "stream": stream}
        call = server.client.start("POST", "/generate", body)
        await server.ring.sent_of(Generate)
        server.ring.push(Text(tokens=Tokens(rid="r", **fields)), step("r", [4], "y", finish=FINISH))
        answer = await call.answer()
        assert answer.status == 500
        assert "could not handle" in answer.text
        assert [abort.rid for abort in await server.ring.sent_of(Abort)] == ["r"]
        assert server.gateway.ring.unfinished == 0 and server.gateway.ring.guard.failed == 1


@asynchronous
async def test_facts_that_say_nonsense_teach_nothing() -> None:
    async with served() as server:
        state = {"paused": "yes", "lacks": 5, "weight_version": "v9"}
        server.ring.push(msgspec.structs.replace(server.gateway.facts, state=state))
        assert (await server.client.get("/flush_cache")).status == 200  # behind it on the ring
        assert (server.gateway.paused, server.gateway.weight_version) == (False, "default")
        assert server.gateway.ring.guard.failed == 1 and not server.gateway.ring.schedulers.heard_of_all


@pytest.mark.parametrize(
    "message",
    [Generate(request=request("r"), text="hi"), Tokenized(request=request("r"), prompt_ids=b""), Tokens(rid="r")],
)
@asynchronous
async def test_a_request_that_no_service_took_is_a_500(message: Message) -> None:
    async with served() as server:
        call = server.client.start("POST", "/generate", {"text": "hi", "rid": "r"})
        await server.ring.sent_of(Generate)
        server.ring.push(message)
        assert (await call.answer()).status == 500


# the guard itself


def test_a_failure_is_counted_and_its_line_in_the_log_is_cut(caplog: pytest.LogCaptureFixture) -> None:
    class Careless:
        whole_batches = True

        def step(self, batch: list[Any]) -> list[Message]:
            if any(m.rid == "bad" for m in batch if isinstance(m, Abort)):
                raise ZeroDivisionError("x" * 10_000 + "\nforged line")
            return list(batch)

        def give_up(self, message: Any, finish: Finish) -> list[Message]:
            return []

    service = Careless()
    guard = Guard("tokenizer", NOBODY, service.give_up)
    for _ in range(3):
        out = guard.batch(service, [Abort(rid="a"), Abort(rid="bad"), Probe(counters={"tokenizer": {}})])
        assert [type(m) for m in out] == [Abort, Probe]
    assert out[-1].counters == {"tokenizer": {"failed_messages_total": 3}}
    lines = [record for record in caplog.records if "could not handle" in record.message]
    assert len(lines) == 3 and all(len(line.message) < 400 and "\n" not in line.message for line in lines)
    assert [bool(line.exc_info) for line in lines] == [True, False, False]  # tracebacks: one a minute


def test_an_epoch_is_looked_up_once_it_is_claimed_and_then_believed() -> None:
    asked: list[str] = []
    announced = Announced(lambda role: asked.append(role) or 2)  # type: ignore[func-returns-value]
    announced.check_epoch("scheduler", 0)
    assert asked == []
    announced.check_epoch("scheduler", 2)
    announced.check_epoch("scheduler", 1)
    assert asked == ["scheduler"]
    for epoch in (3, -1, EVERY_EPOCH):
        with pytest.raises(Malformed, match="no scheduler has epoch"):
            announced.check_epoch("scheduler", epoch)


def test_the_attempts_of_a_gateway_are_believed_once_it_was_started() -> None:
    guard = Guard("scheduler", Announced(lambda role: 1 if role == "gateway" else 0), lambda message, finish: [])
    guard.check_message(tokenized("r", PROMPT, attempt=(2 << ATTEMPT_BITS) - 1))
    with pytest.raises(Malformed):
        guard.check_message(tokenized("r", PROMPT, attempt=2 << ATTEMPT_BITS))
