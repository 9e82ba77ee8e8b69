"""Turns prompts into token ids. Knows no sockets: a batch of messages in, the messages that go on out.

One step does a bounded amount of work: the texts that wait take turns by the call that they belong to, as many as fit
into a step are encoded together, and long ones beside the loop (`long_texts.py`). Long conversations are rendered one a
step, behind everything else. So commands and aborts, and requests
that have no text, overtake texts that wait; an abort ends a request that waits here. A prompt that is refused becomes a
terminal Tokens message, which the scheduler passes on: the gateway hears of it by the same way as of everything else.
"""

import logging
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from quartet.runtime import limits
from quartet.runtime.control import Abort, Probe, Tokenize
from quartet.runtime.errors import EMPTY_IDS, Kind, RequestError, not_whole_rows, too_long
from quartet.runtime.guard import end_of
from quartet.runtime.messages import (
    ABORTED_IN_QUEUE,
    Finish,
    Generate,
    Message,
    Reply,
    Request,
    Restarted,
    Tokenized,
    Tokens,
    pack_ids,
    unpack_ids,
)
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.stop_patterns import check_stops
from quartet.tokenizer_service.jobs import Job, Key, Pace, Piece, chars_of, is_heavy, key_of
from quartet.tokenizer_service.long_texts import LongText, LongTexts, TooManyTokens, cannot_be_tokenized, encode_whole
from quartet.tokenizer_service.pairs import types_of
from quartet.tokenizer_service.prompts import Prompt, Template, prompt_of, rendered
from quartet.tokenizer_service.shorten import cut_ids, picked, places_kept
from quartet.tokenizer_service.thoughts import TAIL_TOKENS, place_of
from quartet.tokenizer_service.turns import Turns

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

log = logging.getLogger(__name__)

ID_BYTES = 4
FLOAT_BYTES = 4
MOST_PASSED_OVER = 8  # steps that a long conversation waits while others have their turns
VERY_LONG_CHARS = 1 << 20  # above, the longest token of the vocabulary tells what cannot fit
LONG_BEAT_S = 0.002  # how often to look after a long text when nothing else is there to do
TOO_LONG = "The input (more than {0} tokens) is longer than the model's context length ({0} tokens)."
TOO_MANY = "The texts have more than {} tokens; send them in several calls."
INTERNAL = "Internal error: the text could not be tokenized ({})."
NO_TOKENIZER = "the tokenizer is not initialized (--skip-tokenizer-init); send input_ids"
NEED_TOKENIZER = ("stop", "stop_regex", "min_new_tokens")  # parameters that mean nothing without one


class Counters(msgspec.Struct):
    """What this service has done since it started."""

    prompts: int = 0
    prompt_tokens: int = 0
    refused: int = 0
    aborted: int = 0  # while they waited here


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
        context_length: int | None = None,
        pace: Pace | None = None,
        executor: Executor | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """No tokenizer: ids in, ids out. `token_types`: the model tells the two texts of a pair apart.

        `executor` encodes long texts; a thread by default.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._hidden_size = hidden_size
        self._token_types = token_types
        self._context_length = context_length
        self._pace = pace or Pace()
        self._clock = clock
        self._jobs: dict[Key, Job] = {}
        self._turns: Turns[Piece] = Turns()
        self._long_turns: Turns[Piece] = Turns()
        self._heavy_turns: Turns[Piece] = Turns()  # conversations that take long to render
        self._passed_over = 0  # steps in which none of them had its turn, for others had
        self._long_texts = None if tokenizer is None else LongTexts(tokenizer, executor)
        self._long: tuple[Piece, Future[Encoding | RequestError | None]] | None = None  # under way
        self._late: list[Message] = []  # answers to messages of earlier steps
        self.counters = Counters()

    @property
    def patience_s(self) -> float | None:
        """How long the next step may wait for messages; None: nothing is left to do."""
        if self._turns or self._heavy_turns:
            return 0.0
        return LONG_BEAT_S if self._long or self._long_turns else None

    def step(self, batch: list[Any]) -> list[Message]:
        """Take messages in, do some of what waits, and give what can be given: in order, unless it has to wait.

        An empty batch goes on with what waits.
        """
        places = [self._take(message) for message in batch]
        self._work()
        for job in self._jobs.values():
            job.place = None
        late, self._late = self._late, []
        return late + [message for place in places for message in place]

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """The end of a request one of whose messages could not be handled."""
        if isinstance(message, Generate | Tokenize):
            self._drop(key_of(message))
        self.counters.refused += isinstance(message, Generate)
        ending = end_of(message, finish)
        return [ending] if ending else []

    # what comes

    def _take(self, message: Message) -> list[Message]:
        """What a message leads to; empty, to be filled later, where it waits."""
        match message:
            case Generate():
                return self._take_request(message)
            case Tokenize():
                return self._wait(message, len(message.texts) + (message.chat is not None))
            case Abort():
                return [*self._abort(message), message]
            case Restarted(role="gateway", least_attempt=least):
                self._forget_older(least)
            case Probe():
                message.counters["tokenizer"] = msgspec.structs.asdict(self.counters) | {"waiting": len(self._jobs)}
        return [message]

    def _take_request(self, message: Generate) -> list[Message]:
        request = message.request
        rival = self._jobs.get(key_of(message))
        if rival and isinstance(rival.message, Generate) and request.attempt < rival.message.request.attempt:
            return []  # of a gateway that has ended
        self._drop(key_of(message))
        if message.text is None and message.chat is None and not request.params.stop_patterns:
            return [self._finished(message, self._refusal(message))]
        return self._wait(message, 1)

    def _wait(self, message: Generate | Tokenize, texts: int) -> list[Message]:
        place: list[Message] = []
        job = Job(message, place, [None] * texts, texts)
        if not texts:
            return [self._reply(job)]
        self._drop(key_of(message))
        self._jobs[key_of(message)] = job
        for index in range(texts):
            self._turns.add(job.call, Piece(job, index))
        return place

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
        """A gateway has come: whoever sent smaller attempts is there no more."""
        for key, job in list(self._jobs.items()):
            if isinstance(job.message, Generate) and job.message.request.attempt < least_attempt:
                self._drop(key)

    def _drop(self, key: Key) -> None:
        """Forget a job that nobody waits for; its texts are passed over when their turn comes."""
        if job := self._jobs.pop(key, None):
            job.unwanted.set()

    # work

    def _work(self) -> None:
        """Encode what fits into a step, and see to the long text."""
        ends_at, chars = self._clock() + self._pace.step_s, 0
        ready: list[Piece] = []
        others = False
        while self._turns and chars < self._pace.step_chars and self._clock() < ends_at:
            piece = self._turns.next()
            if piece.job.unwanted.is_set():
                continue
            if is_heavy(piece, self._pace.long_chars):
                self._heavy_turns.add(piece.job.call, piece)
                continue
            others = True
            chars += self._begin(piece, ready)
        if not others or self._passed_over >= MOST_PASSED_OVER:
            self._begin_heavy(ready)
        elif self._heavy_turns:
            self._passed_over += 1
        for piece, result in zip(ready, self._encode([piece.prompt for piece in ready if piece.prompt]), strict=True):
            self._settle(piece, result)
        self._advance_long()

    def _begin(self, piece: Piece, ready: list[Piece]) -> int:
        """Prepare a text and put it where it is encoded; returns how many of its characters are `ready`'s."""
        prepared = self._prepared(piece)
        if not isinstance(prepared, Prompt):
            self._settle(piece, prepared)
        elif (size := chars_of(prepared)) > self._pace.long_chars:
            self._long_turns.add(piece.job.call, piece)
        else:
            ready.append(piece)
            return size
        return 0

    def _begin_heavy(self, ready: list[Piece]) -> None:
        """One conversation that takes long to render: whoever comes meanwhile waits for no second one."""
        self._passed_over = 0
        while self._heavy_turns:
            piece = self._heavy_turns.next()
            if not piece.job.unwanted.is_set():
                self._begin(piece, ready)
                return

    def _advance_long(self) -> None:
        """Take the long text in that is done, and begin the next."""
        if self._long is not None and self._long[1].done():
            piece, done = self._long
            self._long = None
            self._settle(piece, self._explained(piece, done.result()))
        while self._long is None and self._long_turns:
            piece = self._long_turns.next()
            if piece.job.unwanted.is_set():
                continue
            assert self._long_texts is not None and piece.prompt is not None, "text without a tokenizer is refused"
            text = LongText(piece.prompt, self._most_tokens(piece), piece.job.unwanted)
            self._long = piece, self._long_texts.start(text)

    def _most_tokens(self, piece: Piece) -> int | None:
        """With how many tokens a text is refused; None: with no number, for what is too much is cut off."""
        if isinstance(piece.job.message, Tokenize):
            return limits.MAX_TOKENIZED
        return None if piece.prompt and piece.prompt.truncated else self._context_length

    def _explained(self, piece: Piece, result: "Encoding | RequestError | None") -> "Encoding | RequestError | None":
        if not isinstance(result, TooManyTokens):
            return result
        if isinstance(piece.job.message, Generate):
            return too_long(TOO_LONG.format(self._context_length), "text")
        return RequestError(TOO_MANY.format(limits.MAX_TOKENIZED), field="text")

    def _settle(self, piece: Piece, result: "Encoding | RequestError | None") -> None:
        """One text is done; its job ends with the last, or with the first that is refused."""
        job = piece.job
        if job.unwanted.is_set():
            return
        job.results[piece.index] = result
        job.missing -= 1
        if job.missing and not isinstance(result, RequestError):
            return
        message = job.message
        answer = self._reply(job) if isinstance(message, Tokenize) else self._finished(message, result)
        self._drop(key_of(message))
        (self._late if job.place is None else job.place).append(answer)

    def _prepared(self, piece: Piece) -> Prompt | RequestError | None:
        """The text to encode, None where the prompt is not text, or why the request is refused."""
        message = piece.job.message
        try:
            if isinstance(message, Generate):
                self._check(message.request.params)
                prompt = prompt_of(message, self._template)
            else:
                prompt = self._text_of(message, piece.index)
            if prompt is not None:
                self._check_text(prompt)
                prompt = self._pre_cut(prompt, message.request) if isinstance(message, Generate) else prompt
        except RequestError as error:
            return error
        except Exception as error:
            log.exception("a prompt could not be prepared")
            return RequestError(INTERNAL.format(type(error).__name__), Kind.INTERNAL)
        piece.prompt = prompt
        return prompt

    def _text_of(self, command: Tokenize, index: int) -> Prompt:
        if index < len(command.texts):
            return Prompt(command.texts[index], command.add_special_tokens)
        assert command.chat is not None
        return rendered(command.chat, self._template)

    def _refusal(self, message: Generate) -> RequestError | None:
        """Why a request that has no text is refused, if it is."""
        try:
            self._check(message.request.params)
        except RequestError as error:
            return error
        return None

    def _check(self, params: SamplingParams) -> None:
        """Refuse stop conditions that the detokenizer could not carry out."""
        if self._tokenizer is None:
            for field in NEED_TOKENIZER:
                if getattr(params, field):
                    raise RequestError(f"{field} needs a tokenizer (--skip-tokenizer-init is set)", field=field)
        check_stops(params.stop_patterns)

    def _check_text(self, prompt: Prompt) -> None:
        """Refuse what cannot be encoded, and what is sure not to fit the context before time is spent on it."""
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER, field="text")
        if prompt.truncated:
            return
        chars = chars_of(prompt)
        if self._context_length is None or chars <= VERY_LONG_CHARS:
            return
        if chars > self._context_length * self._longest_token_chars:
            raise too_long(TOO_LONG.format(self._context_length), "text")

    def _pre_cut(self, prompt: Prompt, request: Request) -> Prompt:
        """The prompt without text that is sure to be cut off, before time is spent on it."""
        if request.truncate is None or isinstance(prompt.text, tuple) or len(prompt.text) <= VERY_LONG_CHARS:
            return prompt
        chars = max(request.truncate * self._longest_token_chars, 1)
        text = prompt.text[:chars] if request.truncate_side == "right" else prompt.text[-chars:]
        return replace(prompt, text=text)

    @cached_property
    def _longest_token_chars(self) -> int:
        assert self._tokenizer is not None
        return max(map(len, self._tokenizer.get_vocab()))

    def _encode(self, prompts: list[Prompt]) -> "list[Encoding | RequestError]":
        """An encoding or a refusal for each prompt, in order; prompts under the same rule share a call."""
        found: dict[int, Encoding | RequestError] = {}
        for special in (True, False):
            places = [place for place, prompt in enumerate(prompts) if prompt.special_tokens is special]
            found.update(zip(places, self._encode_texts([prompts[p].text for p in places], special), strict=True))
        return [found[place] for place in range(len(prompts))]

    def _encode_texts(self, texts: list[Any], special: bool) -> "list[Encoding | RequestError]":
        if not texts:
            return []
        assert self._tokenizer is not None, "text without a tokenizer is refused before"
        try:
            return list(encode_whole(self._tokenizer, texts, special))
        except Exception as error:  # tokenizers raises nothing narrower; one bad text must not fail the others
            if len(texts) == 1:
                return [cannot_be_tokenized(error)]
            return [result for text in texts for result in self._encode_texts([text], special)]

    def _finished(self, message: Generate, encoded: "Encoding | RequestError | None") -> Message:
        """What goes to the scheduler: the tokenized request, or its refusal."""
        try:
            return self._tokenized(message, encoded)
        except RequestError as error:
            self.counters.refused += 1
            return Tokens(rid=message.request.rid, attempt=message.request.attempt, finish=Finish.failed(error))

    def _tokenized(self, message: Generate, encoded: "Encoding | RequestError | None") -> Tokenized:
        if isinstance(encoded, RequestError):
            raise encoded
        kept = places_kept(message.request, encoded)
        ids = self._given_ids(message) if encoded is None else pack_ids(picked(encoded.ids, kept))
        types = types_of(picked(encoded.type_ids, kept)) if encoded is not None and self._token_types else b""
        if not ids:
            raise RequestError(EMPTY_IDS, field="input_ids")
        self._place(message, ids)
        self.counters.prompts += 1
        self.counters.prompt_tokens += len(ids) // ID_BYTES
        return Tokenized(request=message.request, prompt_ids=ids, token_types=types, embeds=message.embeds)

    def _place(self, message: Generate, ids: bytes) -> None:
        """See in the end of the prompt where it leaves the model's thought."""
        thought = message.request.thought
        if thought is None or self._tokenizer is None:
            return
        tail = self._tokenizer.decode(unpack_ids(ids[-ID_BYTES * TAIL_TOKENS :]).tolist(), skip_special_tokens=False)
        place = place_of(tail, thought, message.chat)
        if (
            place == "before"
            and message.request.params.json_schema
            and self._tokenizer.token_to_id(thought.opening) is None
        ):
            place = "past"  # whoever learned to think has a token for it: a schema drives no other model into a thought
        message.request.thought = msgspec.structs.replace(thought, place=place)

    def _given_ids(self, message: Generate) -> bytes:
        """The ids of a prompt that is not text; vectors stand at placeholder ids."""
        if not message.embeds:
            if len(message.input_ids) % ID_BYTES:
                raise RequestError("input_ids must be 32-bit integers.", field="input_ids")
            return cut_ids(message.input_ids, message.request)
        positions, rest = divmod(len(message.embeds), FLOAT_BYTES * max(self._hidden_size, 1))
        if rest:
            raise not_whole_rows(self._hidden_size)
        return bytes(ID_BYTES * positions)

    def _reply(self, job: Job) -> Reply:
        """The answer to a Tokenize: the ids of each text as bytes, for all hops carry them."""
        assert isinstance(job.message, Tokenize)
        id = job.message.id
        found: list[Encoding] = []
        for result in job.results:
            if isinstance(result, RequestError):
                return Reply(id=id, success=False, message=result.message, status=result.kind.status)
            if result is not None:
                found.append(result)
        if sum(map(len, found)) > limits.MAX_TOKENIZED:
            return Reply(id=id, success=False, message=TOO_MANY.format(limits.MAX_TOKENIZED), status=400)
        return Reply(id=id, body={"tokens": [pack_ids(encoding.ids) for encoding in found]})
