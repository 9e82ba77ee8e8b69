"""Texts that wait in the tokenizer: who is served when, and what ends their waiting."""

import itertools
from concurrent.futures import Executor, Future
from typing import Any

import pytest
from tokenizers import Tokenizer

from quartet.runtime.control import Abort, FlushCache, Probe, Tokenize
from quartet.runtime.limits import MAX_TOKENIZED
from quartet.runtime.messages import (
    Chat,
    Finish,
    Generate,
    Message,
    Reply,
    Request,
    Restarted,
    Tokenized,
    Tokens,
    unpack_ids,
)
from quartet.runtime.sampling import SamplingParams
from quartet.tokenizer_service import long_texts
from quartet.tokenizer_service.encode import MAX_HEAVY_DELAY, Encoder
from quartet.tokenizer_service.fair_queue import FairQueue
from quartet.tokenizer_service.jobs import Pace
from tests.fakes import AtOnce
from tests.tokenizers_to_try import KINDS

TOKENIZER = KINDS["byte level"]()
ONE_TEXT = Pace(step_chars=1)  # a step
SERIALS = itertools.count(1)


class Later(Executor):
    """Does what it is given when the test says so."""

    def __init__(self) -> None:
        self.given: list[Any] = []

    def submit(self, fn: Any, /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        self.given.append(lambda: future.set_result(fn(*args, **kwargs)))
        return future

    def do(self) -> None:
        self.given.pop(0)()


class Counting:
    """A tokenizer that counts the characters it is given."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self.chars = 0
        self.most = 0

    def encode_batch_fast(self, texts: list[Any], add_special_tokens: bool) -> Any:
        size = sum(len(text) if isinstance(text, str) else sum(map(len, text)) for text in texts)
        self.chars += size
        self.most = max(self.most, size)
        return self._tokenizer.encode_batch_fast(texts, add_special_tokens=add_special_tokens)

    def get_vocab(self) -> dict[str, int]:
        return self._tokenizer.get_vocab()


def prompt(rid: str = "", text: str = "hello", call: int = 0, attempt: int = 0, **params: Any) -> Generate:
    request = Request(rid=rid or f"r{next(SERIALS)}", params=SamplingParams(**params), call=call, attempt=attempt)
    return Generate(request=request, text=text)


def name_of(message: Message) -> str:
    match message:
        case Tokenized(request=request):
            return request.rid
        case Tokens(rid=rid):
            return f"end of {rid}"
        case Reply(id=id):
            return f"reply to {id}"
        case _:
            return type(message).__name__


def steps(encoder: Encoder, *batches: list[Message]) -> list[list[str]]:
    """The names of what each step gives, the batches first, then until nothing is left."""
    made = [encoder.step(batch) for batch in batches]
    while encoder.patience_s is not None:
        made.append(encoder.step([]))
    return [[name_of(message) for message in out] for out in made]


def test_calls_take_turns_and_keep_their_own_order() -> None:
    queue: FairQueue[str] = FairQueue()
    for call, piece in [(1, "a"), (1, "b"), (1, "c"), (2, "x"), (3, "y"), (3, "z")]:
        queue.add(call, piece)
    assert [queue.next() for _ in range(6)] == ["a", "x", "y", "b", "z", "c"]
    assert not queue


def test_a_small_request_does_not_wait_for_the_batch_before_it() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    batch: list[Message] = [prompt(f"a{i}", call=1) for i in range(4)]
    assert steps(encoder, batch, [prompt("b", call=2)]) == [["a0"], ["a1"], ["b"], ["a2"], ["a3"]]


def test_texts_of_one_step_are_encoded_in_one_call_up_to_its_size() -> None:
    counting = Counting(TOKENIZER)
    encoder = Encoder(counting, pace=Pace(step_chars=100))  # type: ignore[arg-type]
    out = steps(encoder, [prompt(f"r{i}", text="x" * 30, call=1) for i in range(10)])
    assert [len(names) for names in out] == [4, 4, 2]
    assert counting.most == 120


class Renders:
    """A template that notes how many messages it was given."""

    def __init__(self) -> None:
        self.rendered: list[int] = []

    def render(self, chat: Chat) -> str:
        self.rendered.append(len(chat.messages))
        return "hello"


def conversation(rid: str, messages: int = 1, content: str = "a", call: str = "") -> Generate:
    request = Request(rid=rid, params=SamplingParams(), call=call)
    return Generate(request=request, chat=Chat(messages=[{"role": "user", "content": content}] * messages))


@pytest.mark.parametrize("heavy", [{"messages": 1000}, {"content": "a" * 100_000}])
def test_long_conversations_are_rendered_one_a_step_and_behind_the_others(heavy: dict[str, Any]) -> None:
    encoder = Encoder(TOKENIZER, template=Renders(), executor=AtOnce())
    batch: list[Message] = [
        *(conversation(f"long{i}", **heavy) for i in range(3)),
        conversation("short"),
        prompt("text"),
    ]
    assert steps(encoder, batch, [prompt("next")]) == [["short", "text"], ["next"], ["long0"], ["long1"], ["long2"]]


def test_a_long_conversation_has_its_turn_however_many_others_come() -> None:
    encoder = Encoder(TOKENIZER, template=Renders())
    out = steps(encoder, [conversation("long", 1000)], *([prompt()] for _ in range(20)))
    assert out[0] == ["long"]
    out = steps(encoder, [conversation("long", 1000), prompt()], *([prompt()] for _ in range(20)))
    assert [number for number, names in enumerate(out) if "long" in names] == [MAX_HEAVY_DELAY]


def test_a_long_conversation_that_was_aborted_is_not_rendered() -> None:
    template = Renders()
    encoder = Encoder(TOKENIZER, template=template)
    assert steps(encoder, [conversation("long", 1000), prompt("a")], [Abort(rid="long")]) == [
        ["a"],
        ["end of long", "Abort"],
    ]
    assert template.rendered == []


def test_commands_and_requests_without_text_overtake_texts_that_wait() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    ids = Generate(request=Request(rid="ids", params=SamplingParams()), input_ids=b"\1\0\0\0")
    first, second = prompt("a", call=1), prompt("b", call=1)
    assert steps(encoder, [first, second, FlushCache(id="f"), ids]) == [["a", "FlushCache", "ids"], ["b"]]


def test_an_abort_ends_a_request_that_waits_and_goes_on() -> None:
    counting = Counting(TOKENIZER)
    encoder = Encoder(counting, pace=ONE_TEXT)  # type: ignore[arg-type]
    encoder.step([prompt("a", call=1), prompt("b", text="never encoded", call=1, attempt=2)])
    abort = Abort(rid="b", exact=True, abort_message="gone")
    end = Tokens(rid="b", attempt=2, finish=Finish(reason="abort", message="gone"))
    assert encoder.step([abort]) == [end, abort]
    assert [name for names in steps(encoder) for name in names] == []
    assert (counting.chars, encoder.counters.aborted) == (len("hello"), 1)


def test_an_abort_of_an_earlier_attempt_spares_the_one_that_waits() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    encoder.step([prompt("a", call=1), prompt("b", call=1, attempt=2)])
    assert [name_of(m) for m in encoder.step([Abort(rid="b", exact=True, attempt=1)])] == ["b", "Abort"]


def test_a_later_attempt_takes_the_place_of_one_that_waits() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    out = [encoder.step([prompt("a", call=1), prompt("b", call=1)]), encoder.step([prompt("b", call=1, attempt=1)])]
    while encoder.patience_s is not None:
        out.append(encoder.step([]))
    sent = [(m.request.rid, m.request.attempt) for step in out for m in step if isinstance(m, Tokenized)]
    assert sent == [("a", 0), ("b", 1)]


def test_what_a_dead_gateway_had_sent_is_forgotten() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    encoder.step([prompt("a", call=1), prompt("b", call=1, attempt=4), prompt("c", call=1, attempt=9)])
    assert steps(encoder, [Restarted(role="gateway", least_attempt=9)]) == [["c", "Restarted"]]


def test_a_rid_that_looks_like_a_commands_id_touches_no_command() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    asked = Tokenize(id="17.4", texts=["one", "two"])
    out = steps(encoder, [asked, prompt("17.4"), Abort(rid="17.4", exact=True)])
    assert sorted(name for names in out for name in names) == ["Abort", "end of 17.4", "reply to 17.4"]


def test_tokenize_is_answered_once_all_its_texts_are_there_in_order() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    texts = ["one", "", "two three"]
    made = encoder.step([Tokenize(id="1", texts=texts)])
    while encoder.patience_s is not None:
        made += encoder.step([])
    [reply] = made
    assert isinstance(reply, Reply) and reply.body
    assert [unpack_ids(ids).tolist() for ids in reply.body["tokens"]] == [TOKENIZER.encode(t).ids for t in texts]


def test_a_long_text_is_encoded_in_the_background_and_an_abort_does_not_wait_for_it() -> None:
    later = Later()
    encoder = Encoder(TOKENIZER, pace=Pace(long_chars=10), executor=later)
    long, other = prompt("long", text="a long text of many words"), prompt("other", text="as long as the other")
    assert [name_of(m) for m in encoder.step([long, other, prompt("short", text="short")])] == ["short"]
    abort = Abort(rid="long", exact=True)
    assert [name_of(m) for m in encoder.step([abort, prompt("new", text="new")])] == ["end of long", "Abort", "new"]
    later.do()
    assert encoder.step([]) == []  # nobody wants it
    later.do()
    [done] = encoder.step([])
    assert isinstance(done, Tokenized)
    assert unpack_ids(done.prompt_ids).tolist() == TOKENIZER.encode("as long as the other").ids
    assert encoder.patience_s is None


@pytest.mark.parametrize("kind", KINDS)
def test_a_long_text_gets_the_ids_that_it_gets_at_once(kind: str) -> None:
    text = "The quick brown fox, 你好，世界 😀 " * 40
    encoder = Encoder(KINDS[kind](), context_length=100_000, pace=Pace(long_chars=10), executor=AtOnce())
    made = encoder.step([prompt(text=text)]) + encoder.step([])
    [done] = made
    assert isinstance(done, Tokenized)
    assert unpack_ids(done.prompt_ids).tolist() == KINDS[kind]().encode(text).ids


def test_a_text_with_far_too_many_tokens_is_refused_after_a_part_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(long_texts, "PIECE_CHARS", 100)
    counting = Counting(TOKENIZER)
    pace = Pace(long_chars=10)
    encoder = Encoder(counting, context_length=50, pace=pace, executor=AtOnce())  # type: ignore[arg-type]
    made = encoder.step([prompt("r", text="word " * 10_000)]) + encoder.step([])
    [end] = made
    assert isinstance(end, Tokens) and end.finish
    assert end.finish.message == (
        "The input (more than 50 tokens) is longer than the model's context length (50 tokens)."
    )
    assert counting.chars < 1000


def test_tokenize_of_too_many_tokens_is_refused() -> None:
    encoder = Encoder(TOKENIZER, executor=AtOnce())
    made = encoder.step([Tokenize(id="1", texts=["7 " * MAX_TOKENIZED])])
    while encoder.patience_s is not None:
        made += encoder.step([])
    [reply] = made
    assert isinstance(reply, Reply)
    assert (reply.status, str(MAX_TOKENIZED) in reply.message) == (400, True)


def test_a_prompt_whose_template_fails_unexpectedly_ends_alone() -> None:
    class Broken:
        def render(self, chat: Chat) -> str:
            raise KeyError("x")

    chat = Generate(request=Request(rid="c", params=SamplingParams()), chat=Chat(messages=[{"role": "user"}]))
    end, fine = Encoder(TOKENIZER, template=Broken()).step([chat, prompt("r")])
    assert isinstance(end, Tokens) and end.finish and end.finish.status == 500
    assert isinstance(fine, Tokenized)


def test_a_step_encodes_a_text_however_slow_the_machine_is() -> None:
    times = itertools.count(0.0, 1.0)
    encoder = Encoder(TOKENIZER, clock=lambda: next(times))
    assert [name_of(made) for made in encoder.step([prompt("a", call=1), prompt("b", call=2)])] == ["a"]
    assert [name_of(made) for made in encoder.step([])] == ["b"]


def test_a_probe_says_how_many_wait() -> None:
    encoder = Encoder(TOKENIZER, pace=ONE_TEXT)
    encoder.step([prompt("a", call=1), prompt("b", call=1), prompt("c", call=1)])
    probe = next(message for message in encoder.step([Probe()]) if isinstance(message, Probe))
    assert probe.counters["tokenizer"]["waiting"] == 2
