"""Stand-ins for the parts that a test leaves out: deterministic, without torch, without sockets."""

import time
import zlib
from array import array
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, Future
from typing import Any

from quartet.runtime.messages import Facts, Logprobs, Message, pack_ids
from quartet.scheduler_service.core.plan import Plan, Result, Slice
from quartet.scheduler_service.core.request import Sequence

FAKE_VECTOR = 4  # length of an embedding
UNSEEN = -1


def next_token(prefix: "array[int]", vocab_size: int, seed: int = 0) -> int:
    """The fake model: a function of the whole prefix and the seed, never the ids 0 and 1."""
    return 2 + zlib.crc32(prefix.tobytes(), seed & 0xFFFFFFFF) % (vocab_size - 2)


def looping_token(prefix: "array[int]", vocab_size: int, seed: int = 0) -> int:
    """A fake model that counts to seven over and over, but for one token in eight."""
    surprise = next_token(prefix, vocab_size, seed)
    return surprise if surprise % 8 == 0 else 2 + (prefix[-1] - 1) % 7


def fake_logprob(token: int) -> float:
    return -0.5 - token % 7


def scored(tokens: "list[int] | array[int]") -> Logprobs:
    return Logprobs(ids=pack_ids(tokens), values=array("f", map(fake_logprob, tokens)).tobytes())


class FakeGrammar:
    """A grammar without an engine: even tokens, at some places a certain one; complete with `length` tokens."""

    def __init__(self, length: int) -> None:
        self.length = length

    def drawn(self, place: int, token: int) -> int:
        """What is drawn as output token number `place` where the model alone would draw `token`."""
        forced = self.forced_token(place)
        return token - token % 2 if forced is None else forced

    def forced_token(self, place: int) -> int | None:
        return 4 + place % 3 * 2 if place % 5 in (2, 3) else None

    def matcher(self, output_ids: "Iterable[int]" = ()) -> "FakeGuide":
        guide = self.guide()
        guide.take(array("i", output_ids))
        return guide

    def guide(self) -> "FakeGuide":
        return FakeGuide(self)


class FakeGuide:
    """How far one request has come in a fake grammar. Raises for tokens that the grammar does not allow."""

    def __init__(self, grammar: FakeGrammar) -> None:
        self.grammar = grammar
        self.place = 0

    @property
    def finished(self) -> bool:
        return self.place >= self.grammar.length

    def take(self, tokens: "array[int]") -> None:
        for token in tokens:
            assert self.allowed((token,)), (self.place, token)
            self.place += 1

    def allowed(self, draft: tuple[int, ...]) -> int:
        right = [
            self.place + i < self.grammar.length and self.grammar.drawn(self.place + i, token) == token
            for i, token in enumerate(draft)
        ]
        return [*right, False].index(False)

    def forced(self) -> tuple[int, ...]:
        tokens: list[int] = []
        while (token := self.grammar.forced_token(self.place + len(tokens))) is not None:
            tokens.append(token)
        return tuple(tokens[: self.grammar.length - self.place])


class FakeGrammars:
    """A pool of fake grammars, of the length that a request's regex says. It takes its time: some calls of `ready`."""

    def __init__(self, most_calls: int = 2) -> None:
        self._most_calls = most_calls
        self._waiting: dict[str, tuple[int, int]] = {}  # rid → its grammar's length, calls until it is ready

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None:
        self._waiting[rid] = int(text), len(self._waiting) % (self._most_calls + 1)

    def cancel(self, rid: str) -> None:
        self._waiting.pop(rid, None)

    def ready(self) -> list[tuple[str, FakeGrammar]]:
        done = [(rid, FakeGrammar(length)) for rid, (length, calls) in self._waiting.items() if not calls]
        self._waiting = {rid: (length, calls - 1) for rid, (length, calls) in self._waiting.items() if calls}
        return done


class FakeWorker:
    """Computes `next_token` through a paged memory of its own, so that a wrong page, slot or order changes the output.

    The memory maps (page, offset) to the token written there; a step reads its whole prefix back through the pages.
    """

    def __init__(
        self,
        page_size: int = 1,
        page_count: int = 1000,
        max_running_requests: int = 64,
        vocab_size: int = 1000,
        step_s: float = 0.0,
        model: Callable[..., int] = next_token,
    ) -> None:
        self.page_size = page_size
        self.page_count = page_count
        self.max_running_requests = max_running_requests
        self.vocab_size = vocab_size
        self.step_s = step_s
        self.model = model
        self.weight_version = "default"
        self.expert_recorder = None
        self.depth = 0
        self.snapshots = None
        self.uses_graphs = False
        self.plans: list[Plan] = []
        self.forgotten: list[str] = []
        self.faults: dict[str, str] = {}  # rid → Result.error of its next slice
        self.raising: dict[str, tuple[str, int]] = {}  # rid → what raises for it, and from which position on
        self.resets = 0
        self._memory = array("i", [UNSEEN]) * ((page_count + 1) * page_size)
        self._sampled: dict[int, int] = {}  # slot → token sampled last
        self._launched: list[Slice] = []
        self.jumps = False  # as a worker that takes the tokens at once which a grammar forces
        self.recurrent = False  # as a model that goes on from a state of its own, by slot
        self._states: dict[int, array[int]] = {}  # slot → the tokens that its state has seen
        self._snapshots: dict[int, array[int]] = {}

    def idle_work(self) -> bool:
        return False

    def launch(self, plan: Plan) -> list[Result]:
        """The step is computed here, in launch order, as a device stream would; `collect` hands it over."""
        self.plans.append(plan)
        self._raise_for(plan.slices, "launch")
        self._launched = plan.slices
        return [self._compute(part) for part in plan.slices]

    def collect(self, pending: list[Result]) -> list[Result]:
        if self.step_s:
            time.sleep(self.step_s)
        self._raise_for(self._launched, "collect")
        return pending

    def reset(self) -> None:
        self.resets += 1
        self._sampled.clear()

    def _raise_for(self, slices: list[Slice], where: str) -> None:
        for part in slices:
            kind, position = self.raising.get(part.sequence.rid, ("", 0))
            if kind == where and part.end > position:
                raise ZeroDivisionError(part.sequence.rid)

    def forget(self, sequence: Sequence) -> None:
        self.forgotten.append(sequence.rid)
        self._sampled.pop(sequence.slot, None)

    def facts(self) -> Facts:
        tokens = self.page_size * self.page_count
        return Facts(
            max_total_num_tokens=tokens,
            max_req_input_len=tokens - 1,
            context_length=tokens,
            vocab_size=self.vocab_size,
        )

    def _compute(self, part: Slice) -> Result:
        sequence = part.sequence
        for position in range(part.start, part.end):
            self._memory[self._cell(sequence, position)] = self._input(part, position)
        if self.recurrent:
            self._advance_state(part)
        if fault := self.faults.pop(sequence.rid, ""):
            self._sampled[sequence.slot] = 0  # an overlapped step may still read it
            return Result(error=fault)
        prefix = array("i", (self._memory[self._cell(sequence, position)] for position in range(part.end)))
        result = Result()
        if sequence.request.return_hidden_states:
            result.hidden_states = bytes(part.end - part.start)  # one byte a position
        if sequence.request.return_routed_experts:
            result.routed_experts = pack_ids(range(part.start, part.end))  # a position's row is its number
        if part.score_from >= 0:
            result.input_logprobs = scored(sequence.ids[part.score_from : min(part.end + 1, sequence.prompt_len)])
        if part.samples:
            result.tokens = self._draw(part, prefix)
            if isinstance(grammar := sequence.grammar, FakeGrammar):
                done = part.end - len(part.drafts) + len(result.tokens) - sequence.prompt_len
                result.complete = done >= grammar.length
            self._sampled[sequence.slot] = result.tokens[-1]
            if sequence.request.logprobs:
                result.logprobs = [scored([token]) for token in result.tokens]
        elif sequence.request.task == "embed" and part.end == len(sequence.ids):
            result.vector = array("f", [float(len(prefix))] * FAKE_VECTOR).tobytes()
        return result

    def _advance_state(self, part: Slice) -> None:
        """The state of the slice's slot goes through its tokens, as recurrent layers would."""
        slot = part.sequence.slot
        if part.restores >= 0:
            state = self._snapshots[part.restores][:]
        else:
            state = self._states[slot][:] if part.start else array("i")
        assert len(state) == part.start, (part.sequence.rid, part.start, len(state))
        state.extend(self._memory[self._cell(part.sequence, position)] for position in range(part.start, part.end))
        prefix = array("i", (self._memory[self._cell(part.sequence, position)] for position in range(part.end)))
        assert state == prefix, part.sequence.rid
        self._states[slot] = state
        for position, number in part.saves:
            assert part.start < position <= part.end, (part.start, part.end, part.saves)
            self._snapshots[number] = state[:position]

    def _input(self, part: Slice, position: int) -> int:
        ids = part.sequence.ids
        if position < len(ids):
            return ids[position]
        return part.drafts[position - part.end] if part.drafts else self._sampled[part.sequence.slot]

    def _draw(self, part: Slice, prefix: "array[int]") -> list[int]:
        """The next token, and those behind drafts that were right."""
        tokens: list[int] = []
        for draft in (*part.drafts, None):
            known = len(prefix) - len(part.drafts) + len(tokens)
            token = self.model(prefix[:known], self.vocab_size, part.sequence.request.seed)
            if isinstance(grammar := part.sequence.grammar, FakeGrammar):
                place = known - part.sequence.prompt_len
                token = grammar.drawn(place, token)
                if place + 1 >= grammar.length:
                    draft = None  # complete: nothing comes behind it
            tokens.append(token)
            if token != draft:
                break
        return tokens + self._forced(part, len(tokens)) if self.jumps else tokens

    def _forced(self, part: Slice, drawn: int) -> list[int]:
        """What a grammar forces behind the tokens that were drawn."""
        grammar, tokens = part.sequence.grammar, list[int]()
        first = part.end - part.sequence.prompt_len + drawn
        while isinstance(grammar, FakeGrammar) and first + len(tokens) < grammar.length:
            token = grammar.forced_token(first + len(tokens))
            if token is None:
                break
            tokens.append(token)
        return tokens

    def _cell(self, sequence: Sequence, position: int) -> int:
        page = sequence.pages[position // self.page_size]
        assert 0 < page <= self.page_count, page
        return page * self.page_size + position % self.page_size


class FakeInbox:
    """Frames put in by the test; `waits` records the timeouts of empty receives."""

    def __init__(self) -> None:
        self.frames: deque[list[Message]] = deque()
        self.waits: list[float | None] = []

    def put(self, *messages: Message) -> None:
        self.frames.append(list(messages))

    def recv(self, timeout_s: float | None = 0.0) -> list[Any]:
        if not self.frames:
            self.waits.append(timeout_s)
        messages = [message for frame in self.frames for message in frame]
        self.frames.clear()
        return messages


class FakeOutbox:
    """Keeps the frames that were sent."""

    def __init__(self) -> None:
        self.frames: list[list[Message]] = []

    def send(self, messages: Any) -> None:
        self.frames.append(list(messages))

    @property
    def messages(self) -> list[Any]:
        return [message for frame in self.frames for message in frame]


class FakeProgress:
    """A progress word that counts."""

    def __init__(self) -> None:
        self.beats: list[bool] = []

    def beat(self, busy: bool) -> None:
        self.beats.append(busy)


class AtOnce(Executor):
    """Does what it is given at once; whoever gave it hears of it with the next step."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        future: Future[Any] = Future()
        future.set_result(fn(*args, **kwargs))
        return future
