"""The detokenizer's work, without sockets: Tokens in, Text out.

A request has a stream here from its first Tokens message to its end, which is the scheduler's last message or a stop
found in the text. After such a stop an Abort goes on round the ring to the scheduler, and what the scheduler still
sends for the request is dropped.
"""

import time
from collections import defaultdict
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any

import msgspec

from quartet.detokenizer_service.cut import cut, first_rows
from quartet.detokenizer_service.decode import Vocabulary
from quartet.detokenizer_service.logprobs import add_texts
from quartet.detokenizer_service.stream import Stream
from quartet.detokenizer_service.whole_texts import WholeTexts
from quartet.runtime.control import Abort, Detokenize, Probe
from quartet.runtime.guard import end_of
from quartet.runtime.messages import Facts, Finish, Message, Text, Tokens, unpack_ids

ID_BYTES = 4
NO_BEGINNING = "Internal error: the beginning of the answer was lost."


class Counters(msgspec.Struct):
    """What this service has done since it started."""

    tokens: int = 0
    stopped: int = 0  # requests, by a string or pattern in their text
    dropped: int = 0  # messages of requests that had ended, or of older attempts


@dataclass(slots=True)
class Stopped:
    """A request that ended here before the scheduler knew; its last message from there is still to come."""

    kept: int  # positions, prompt included, from the first whose experts are wanted
    made: int
    text: Text | None  # held until then where it lacks what only that message brings
    rank: int  # of the scheduler


class Detokenizer:
    """The streams that run, and what is done with each message."""

    whole_batches = False  # a stream must not be fed twice

    def __init__(self, vocabulary: Vocabulary | None, executor: Executor | None = None) -> None:
        """No vocabulary: ids in, ids out. `executor` decodes long sequences; a thread by default."""
        self._vocabulary = vocabulary
        self._whole_texts = WholeTexts(vocabulary, executor)
        self._streams: dict[str, Stream] = {}
        self._stopped: dict[str, Stopped] = {}
        self._epochs: defaultdict[int, int] = defaultdict(int)  # of the schedulers, by rank
        self.counters = Counters()

    @property
    def patience_s(self) -> float | None:
        """How long the next step may wait for messages; None: nothing is left to do."""
        return self._whole_texts.patience_s

    def step(self, batch: list[Any]) -> list[Message]:
        """Answer what is for this service and pass on the rest, in order; long sequences of ids are decoded apart."""
        return [*self._whole_texts.done(), *(answer for message in batch for answer in self._answers(message))]

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """End a request one of whose messages could not be handled; what still comes for it is dropped."""
        if isinstance(message, Tokens):
            return self._give_up_tokens(message, finish)
        match end_of(message, finish):
            case Tokens() as tokens:
                return [_text("", tokens)]
            case None:
                return []
            case ending:
                return [ending]

    def _give_up_tokens(self, tokens: Tokens, finish: Finish) -> list[Message]:
        rid, stream = tokens.rid, self._streams.get(tokens.rid)
        if stream is not None and tokens.attempt < stream.request.attempt:
            return self._drop()
        last = tokens.finish is not None
        stopped = self._stopped.get(rid)
        if stopped is not None and tokens.request is None:
            if last:
                del self._stopped[rid]
            if not last or stopped.text is None:  # its client has heard the end
                return self._drop()
        self._streams.pop(rid, None)
        ended = Text(tokens=Tokens(rid=rid, attempt=tokens.attempt, finish=finish))
        if last:
            return [ended]
        if self._vocabulary is not None:  # whoever decodes nothing keeps nothing, and passes on all that comes
            self._stopped[rid] = Stopped(0, 0, None, tokens.rank)
        return [ended, Abort(rid=rid, exact=True, attempt=tokens.attempt, rank=tokens.rank)]

    def _answers(self, message: Message) -> list[Message]:
        match message:
            case Tokens():
                return self._on_tokens(message)
            case Detokenize():
                return [*self._whole_texts.take(message)]
            case Facts(rank=rank, epoch=epoch):
                self._meet(rank, epoch)
            case Probe():
                counters = msgspec.structs.asdict(self.counters)
                message.counters["detokenizer"] = {"running": len(self._streams), **counters}
        return [message]

    def _on_tokens(self, tokens: Tokens) -> list[Message]:
        self.counters.tokens += len(tokens.ids) // ID_BYTES
        if self._vocabulary is None or tokens.vector:
            return [_text("", tokens)]
        stream = self._streams.get(tokens.rid)
        if stream is not None and tokens.attempt < stream.request.attempt:
            return self._drop()
        if tokens.request is not None:
            self._meet(tokens.rank, tokens.request.epoch)
            if (
                tokens.request.epoch < self._epochs[tokens.rank]
            ):  # of a dead scheduler, behind the first word of its successor
                return self._drop()
            self._stopped.pop(tokens.rid, None)
            stream = self._streams[tokens.rid] = Stream(self._vocabulary, tokens.request, tokens.prompt_tail)
        return self._without_stream(tokens) if stream is None else self._decoded(stream, tokens, self._vocabulary)

    def _decoded(self, stream: Stream, tokens: Tokens, vocabulary: Vocabulary) -> list[Message]:
        """One step of a stream: its text, and an Abort where that ends before the scheduler knows."""
        ids = unpack_ids(tokens.ids)
        text, kept, stop = stream.feed(ids, tokens.finish)
        if stop is not None or tokens.finish is not None:
            del self._streams[tokens.rid]
        early = tokens.finish is None
        if stop is not None:
            cut(tokens, kept, len(ids))
            tokens.finish = Finish(reason="stop", matched=stop.name)
        add_texts(tokens, stream, vocabulary)
        last = _text(text, tokens)
        return [last] if stop is None else self._stop(stream, last, len(ids) - kept, early)

    def _stop(self, stream: Stream, last: Text, surplus: int, early: bool) -> list[Message]:
        """End a stream whose text has met a stop, `surplus` ids before the last one made."""
        self.counters.stopped += 1
        tokens = last.tokens
        made = tokens.prompt_tokens + stream.made - stream.request.routed_experts_start_len
        if not early:
            tokens.routed_experts = first_rows(tokens.routed_experts, made - surplus - 1, made - 1)
            return [last]
        waits = stream.request.return_routed_experts
        self._stopped[tokens.rid] = Stopped(made - surplus, made, last if waits else None, tokens.rank)
        abort = Abort(rid=tokens.rid, exact=True, attempt=tokens.attempt, rank=tokens.rank)
        return [abort] if waits else [last, abort]

    def _without_stream(self, tokens: Tokens) -> list[Message]:
        """The end of a request that never ran goes on; what comes after an end here does not."""
        stopped = self._stopped.get(tokens.rid)
        if stopped is None:
            return self._drop() if tokens.finish is None else [_text("", without_beginning(tokens))]
        stopped.made += len(tokens.ids) // ID_BYTES
        if tokens.finish is None:
            return self._drop()
        del self._stopped[tokens.rid]
        if stopped.text is None:
            return self._drop()
        stopped.text.tokens.routed_experts = first_rows(tokens.routed_experts, stopped.kept - 1, stopped.made - 1)
        return [stopped.text]

    def _meet(self, rank: int, epoch: int) -> None:
        """A scheduler speaks. When it is a new one, what the one before ran is over; it will be sent again."""
        if epoch > self._epochs[rank]:
            self._epochs[rank] = epoch
            self._streams = {rid: stream for rid, stream in self._streams.items() if stream.request.rank != rank}
            self._stopped = {rid: stopped for rid, stopped in self._stopped.items() if stopped.rank != rank}

    def _drop(self) -> list[Message]:
        self.counters.dropped += 1
        return []


def without_beginning(tokens: Tokens) -> Tokens:
    """The end of a request that has no stream here: right for one that failed before it ran, else half is missing."""
    if tokens.finish is not None and tokens.finish.reason in ("error", "abort"):
        return tokens
    return Tokens(rid=tokens.rid, attempt=tokens.attempt, finish=Finish.internal(NO_BEGINNING))


def _text(text: str, tokens: Tokens) -> Text:
    thought = tokens.request.thought if tokens.request is not None else None
    tokens.request = None
    tokens.prompt_tail = b""
    if tokens.times is not None:
        tokens.times.text_at = time.monotonic()
    return Text(text=text, place=thought.place if thought is not None else None, tokens=tokens)
