"""The detokenizer's work, without sockets: Tokens in, Text out.

A request has a stream here from its first Tokens message to its end, which is the scheduler's last message or a stop
found in the text. After such a stop an Abort goes on round the ring to the scheduler, and what the scheduler still
sends for the request is dropped.
"""

from typing import Any

import msgspec

from detokenizer_service.decode import Vocabulary
from detokenizer_service.logprobs import cut, fill_texts
from detokenizer_service.stream import Stream
from runtime.control import Abort, Detokenize, Probe
from runtime.messages import Facts, Finish, Message, Reply, Text, Tokens, unpack_ids

FLOAT_BYTES = 4
NO_TOKENIZER = "the tokenizer is not initialized (--skip-tokenizer-init)"


class Counters(msgspec.Struct):
    """What this service has done since it started."""

    tokens: int = 0
    stopped: int = 0  # requests, by a string or pattern in their text
    dropped: int = 0  # messages of requests that had ended, or of older attempts


class Detokenizer:
    """The streams that run, and what is done with each message."""

    def __init__(self, vocabulary: Vocabulary | None) -> None:
        """No vocabulary: ids in, ids out."""
        self._vocabulary = vocabulary
        self._streams: dict[str, Stream] = {}
        self._stopped: set[str] = set()  # ended by a stop here; the scheduler's last message is still to come
        self.counters = Counters()

    def step(self, batch: list[Any]) -> list[Message]:
        """Answer what is ours, pass the rest on, keep the order."""
        out: list[Message] = []
        for message in batch:
            match message:
                case Tokens():
                    out += self._on_tokens(message)
                case Detokenize():
                    out.append(self._reply(message))
                case _:
                    self._note(message)
                    out.append(message)
        return out

    def _note(self, message: Message) -> None:
        match message:
            case Probe():
                counters = msgspec.structs.asdict(self.counters)
                message.counters["detokenizer"] = {"running": len(self._streams), **counters}
            case Facts():  # a scheduler has started; what an earlier one ran is over
                self._streams.clear()
                self._stopped.clear()

    def _on_tokens(self, tokens: Tokens) -> list[Message]:
        self.counters.tokens += len(tokens.ids) // FLOAT_BYTES
        if self._vocabulary is None or tokens.vector:
            return [_text("", tokens)]
        stream = self._streams.get(tokens.rid)
        if stream is not None and tokens.attempt < stream.request.attempt:
            return self._drop()
        if tokens.request is not None:
            self._stopped.discard(tokens.rid)
            stream = self._streams[tokens.rid] = Stream(self._vocabulary, tokens.request, tokens.prompt_tail)
        return self._without_stream(tokens) if stream is None else self._decoded(stream, tokens, self._vocabulary)

    def _without_stream(self, tokens: Tokens) -> list[Message]:
        """The end of a request that never ran goes on; what comes after an end here does not."""
        if tokens.rid in self._stopped:
            if tokens.finish is not None:
                self._stopped.remove(tokens.rid)
            return self._drop()
        return self._drop() if tokens.finish is None else [_text("", tokens)]

    def _drop(self) -> list[Message]:
        self.counters.dropped += 1
        return []

    def _decoded(self, stream: Stream, tokens: Tokens, vocabulary: Vocabulary) -> list[Message]:
        """One step of a stream: its text, and an Abort where the text ends before the scheduler knows."""
        ids = unpack_ids(tokens.ids)
        text, taken, match = stream.feed(stream.spoken(ids, tokens.finish))
        if tokens.finish is not None and match is None:
            rest, match = stream.flush()
            text, taken = text + rest, len(ids)
        aborts: list[Message] = []
        if match is not None:
            self.counters.stopped += 1
            if tokens.finish is None:
                self._stopped.add(tokens.rid)
                aborts.append(Abort(rid=tokens.rid))
            _end_at(tokens, taken, len(ids), Finish(reason="stop", matched=match.name))
        if tokens.finish is not None:
            del self._streams[tokens.rid]
        _add_texts(stream, tokens, vocabulary)
        return [_text(text, tokens), *aborts]

    def _reply(self, command: Detokenize) -> Reply:
        if self._vocabulary is None:
            return Reply(id=command.id, success=False, message=NO_TOKENIZER, status=400)
        try:
            sequences = [unpack_ids(ids) for ids in command.ids]
            texts = [self._vocabulary.decode(ids, command.skip_special_tokens) for ids in sequences]
        except (ValueError, OverflowError):
            return Reply(id=command.id, success=False, message="tokens must be ids of the vocabulary.", status=400)
        return Reply(id=command.id, body={"texts": texts})


def _text(text: str, tokens: Tokens) -> Text:
    tokens.request = None
    tokens.prompt_tail = b""
    return Text(text=text, tokens=tokens)


def _end_at(tokens: Tokens, kept: int, made: int, finish: Finish) -> None:
    """End a request at the token that completed its stop: what was made behind it is cut off."""
    tokens.finish = finish
    if kept == made:
        return
    tokens.ids = tokens.ids[: len(tokens.ids) // made * kept]
    if tokens.logprobs is not None:
        cut(tokens.logprobs, kept, made)
    if tokens.hidden_states:
        tokens.hidden_states = tokens.hidden_states[: -(made - kept) * tokens.hidden_size * FLOAT_BYTES]


def _add_texts(stream: Stream, tokens: Tokens, vocabulary: Vocabulary) -> None:
    options = stream.request.logprobs
    if options is None or not options.text:
        return
    for logprobs in (tokens.logprobs, tokens.input_logprobs):
        if logprobs is not None:
            fill_texts(logprobs, options, vocabulary)
