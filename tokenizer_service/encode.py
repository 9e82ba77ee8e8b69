"""The tokenizer's work, without sockets: a batch of messages in, the messages that go on out.

One step does a bounded amount of work. Texts wait in a fair queue by the call that they belong to; as many as fit into
a step are encoded together. Long texts are encoded in the background (`long_texts.py`). Long conversations are rendered
one a step, after everything else. So commands, aborts and requests without text overtake texts that wait, and an abort
ends a request that waits here. A prompt that is refused becomes a terminal Tokens message, which the scheduler passes
on like any other.
"""

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import TYPE_CHECKING, Any

import msgspec

from quartet.runtime import limits
from quartet.runtime.control import Abort, Probe, Tokenize
from quartet.runtime.errors import RequestError, too_long
from quartet.runtime.guard import end_of
from quartet.runtime.messages import ABORTED_IN_QUEUE, Finish, Generate, Message, Restarted, Tokens
from quartet.tokenizer_service.answers import TOO_MANY, AnswerBuilder, Filler, reply_to
from quartet.tokenizer_service.fair_queue import FairQueue
from quartet.tokenizer_service.jobs import Job, Key, Pace, Piece, chars_of, is_heavy, key_of
from quartet.tokenizer_service.long_texts import LongText, LongTexts, TooManyTokens
from quartet.tokenizer_service.prompts import Prompt, Template
from quartet.tokenizer_service.text_encoder import TOO_LONG, TextEncoder

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

MAX_HEAVY_DELAY = 8  # steps that a long conversation waits while there is other work
LONG_BEAT_S = 0.002  # how often to look after a long text when there is nothing else to do


class Encoder:
    """The tokenizer service's work for one model."""

    whole_batches = True  # a message that is taken in again takes its own place

    def __init__(
        self,
        tokenizer: "Tokenizer | None",
        *,
        template: Template | None = None,
        hidden_size: int = 0,
        token_types: bool = False,
        filler: Filler | None = None,
        context_length: int | None = None,
        pace: Pace | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No tokenizer: ids in, ids out. `token_types`: the model tells the two texts of a pair apart.

        `filler`: of a model that fills queries up.

        `executor` encodes long texts; a thread by default.
        """
        self._texts = TextEncoder(tokenizer, template, context_length)
        self._answers = AnswerBuilder(tokenizer, hidden_size, token_types, filler)
        self.counters = self._answers.counters
        self._pace = pace or Pace()
        self._clock = clock
        self._jobs: dict[Key, Job] = {}
        self._waiting: FairQueue[Piece] = FairQueue()
        self._waiting_long: FairQueue[Piece] = FairQueue()
        self._waiting_heavy: FairQueue[Piece] = FairQueue()  # conversations that take long to render
        self._heavy_delay = 0  # steps since one of them was rendered, in which there was other work
        self._long_texts = None if tokenizer is None else LongTexts(tokenizer, executor)
        self._long: tuple[Piece, Future[Encoding | RequestError | None]] | None = None  # being encoded
        self._late: list[Message] = []  # answers to messages of earlier steps

    @property
    def patience_s(self) -> float | None:
        """How long the next step may wait for messages; None: nothing is left to do."""
        if self._waiting or self._waiting_heavy:
            return 0.0
        return LONG_BEAT_S if self._long or self._waiting_long else None

    def step(self, batch: list[Any]) -> list[Message]:
        """Take messages in, do some of what waits, and give what can be given: in order, unless it has to wait.

        An empty batch goes on with what waits.
        """
        slots = [self._receive(message) for message in batch]
        self._work()
        for job in self._jobs.values():
            job.slot = None
        late, self._late = self._late, []
        return late + [message for slot in slots for message in slot]

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """The end of a request one of whose messages could not be handled."""
        if isinstance(message, Generate | Tokenize):
            self._drop(key_of(message))
        self.counters.refused += isinstance(message, Generate)
        ending = end_of(message, finish)
        return [ending] if ending else []

    # messages

    def _receive(self, message: Message) -> list[Message]:
        """The answers to a message; an empty list that is filled later where it has to wait."""
        match message:
            case Generate():
                return self._receive_request(message)
            case Tokenize():
                return self._wait(message, len(message.texts) + (message.chat is not None))
            case Abort():
                return [*self._abort(message), message]
            case Restarted(role="gateway", least_attempt=least):
                self._forget_older(least)
            case Probe():
                message.counters["tokenizer"] = msgspec.structs.asdict(self.counters) | {"waiting": len(self._jobs)}
        return [message]

    def _receive_request(self, message: Generate) -> list[Message]:
        request = message.request
        earlier = self._jobs.get(key_of(message))
        if earlier and isinstance(earlier.message, Generate) and request.attempt < earlier.message.request.attempt:
            return []  # from a gateway process that has ended
        self._drop(key_of(message))
        if message.text is None and message.chat is None and not request.params.stop_patterns:
            return [self._answers.finish(message, self._texts.refusal_of(message))]
        return self._wait(message, 1)

    def _wait(self, message: Generate | Tokenize, texts: int) -> list[Message]:
        slot: list[Message] = []
        job = Job(message, slot, [None] * texts, texts)
        if not texts:
            return [reply_to(job)]
        self._drop(key_of(message))
        self._jobs[key_of(message)] = job
        for index in range(texts):
            self._waiting.add(job.call, Piece(job, index))
        return slot

    def _abort(self, abort: Abort) -> list[Message]:
        """The end of a request that waits here. The abort goes on: the scheduler may have an earlier attempt of it."""
        job = self._jobs.get((Generate, abort.rid))
        if job is None or not isinstance(job.message, Generate):
            return []
        request = job.message.request
        if abort.attempt is not None and request.attempt > abort.attempt:
            return []
        self._drop(key_of(job.message))
        self.counters.aborted += 1
        finish = Finish(reason="abort", message=abort.abort_message or ABORTED_IN_QUEUE)
        return [Tokens(rid=request.rid, attempt=request.attempt, finish=finish)]

    def _forget_older(self, least_attempt: int) -> None:
        """A gateway has started: the one that sent smaller attempts has ended."""
        for key, job in list(self._jobs.items()):
            if isinstance(job.message, Generate) and job.message.request.attempt < least_attempt:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        """Forget a job that nobody waits for; its texts are skipped when they come to the front."""
        if job := self._jobs.pop(key, None):
            job.cancelled.set()

    # work

    def _work(self) -> None:
        """Encode what fits into a step, at least one text, and look after the long text."""
        ends_at, chars = self._clock() + self._pace.step_s, 0
        ready: list[Piece] = []
        others = False
        while self._waiting and chars < self._pace.step_chars and (not others or self._clock() < ends_at):
            piece = self._waiting.next()
            if piece.job.cancelled.is_set():
                continue
            if is_heavy(piece, self._pace.long_chars):
                self._waiting_heavy.add(piece.job.call, piece)
                continue
            others = True
            chars += self._prepare(piece, ready)
        if not others or self._heavy_delay >= MAX_HEAVY_DELAY:
            self._prepare_heavy(ready)
        elif self._waiting_heavy:
            self._heavy_delay += 1
        for piece, result in zip(
            ready, self._texts.encode([piece.prompt for piece in ready if piece.prompt]), strict=True
        ):
            self._complete(piece, result)
        self._advance_long()

    def _prepare(self, piece: Piece, ready: list[Piece]) -> int:
        """Prepare a text and queue it for encoding; returns its characters if it was added to `ready`, else 0."""
        prepared = self._texts.prepare(piece.job.message, piece.index)
        if not isinstance(prepared, Prompt):
            self._complete(piece, prepared)
            return 0
        piece.prompt = prepared
        if (size := chars_of(prepared)) > self._pace.long_chars:
            self._waiting_long.add(piece.job.call, piece)
        else:
            ready.append(piece)
            return size
        return 0

    def _prepare_heavy(self, ready: list[Piece]) -> None:
        """Render one conversation that takes long; no second one in this step."""
        self._heavy_delay = 0
        while self._waiting_heavy:
            piece = self._waiting_heavy.next()
            if not piece.job.cancelled.is_set():
                self._prepare(piece, ready)
                return

    def _advance_long(self) -> None:
        """Take the long text in that is done, and begin the next."""
        if self._long is not None and self._long[1].done():
            piece, done = self._long
            self._long = None
            self._complete(piece, self._explained(piece, done.result()))
        while self._long is None and self._waiting_long:
            piece = self._waiting_long.next()
            if piece.job.cancelled.is_set():
                continue
            assert self._long_texts is not None and piece.prompt is not None, "text without a tokenizer is refused"
            text = LongText(piece.prompt, self._max_tokens(piece), piece.job.cancelled)
            self._long = piece, self._long_texts.start(text)

    def _max_tokens(self, piece: Piece) -> int | None:
        """More tokens than this are refused; None: no limit, because the surplus is cut off."""
        if isinstance(piece.job.message, Tokenize):
            return limits.MAX_TOKENIZED
        return None if piece.prompt and piece.prompt.truncated else self._texts.context_length

    def _explained(self, piece: Piece, result: "Encoding | RequestError | None") -> "Encoding | RequestError | None":
        """The result of a long text, with the message that fits its kind of request."""
        if not isinstance(result, TooManyTokens):
            return result
        if isinstance(piece.job.message, Generate):
            return too_long(TOO_LONG.format(self._texts.context_length), "text")
        return RequestError(TOO_MANY.format(limits.MAX_TOKENIZED), field="text")

    def _complete(self, piece: Piece, result: "Encoding | RequestError | None") -> None:
        """Note the result of one text; its job ends with the last text, or with the first that is refused."""
        job = piece.job
        if job.cancelled.is_set():
            return
        job.results[piece.index] = result
        job.missing -= 1
        if job.missing and not isinstance(result, RequestError):
            return
        message = job.message
        answer = reply_to(job) if isinstance(message, Tokenize) else self._answers.finish(message, result)
        self._drop(key_of(message))
        (self._late if job.slot is None else job.slot).append(answer)
