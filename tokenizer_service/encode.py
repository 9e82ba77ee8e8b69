"""Turns prompts into token ids. Knows no sockets: a batch of messages in, the messages that go on out.

Everything that waits is encoded in one call. A prompt that is refused becomes a terminal Tokens message, which the
scheduler passes on: the gateway hears of it by the same way as of everything else.
"""

from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.control import Probe, Tokenize
from runtime.errors import EMPTY_IDS, RequestError, not_whole_rows, too_long
from runtime.guard import end_of
from runtime.messages import Finish, Generate, Message, Reply, Request, Tokenized, Tokens, pack_ids, unpack_ids
from runtime.sampling import SamplingParams
from runtime.stop_patterns import compile_stop
from tokenizer_service.pairs import types_of
from tokenizer_service.prompts import Prompt, Template, prompt_of, rendered
from tokenizer_service.shorten import cut_ids, picked, places_kept
from tokenizer_service.thoughts import TAIL_TOKENS, place_of

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ID_BYTES = 4
FLOAT_BYTES = 4
LONG_TEXT_CHARS = 1 << 20  # takes about a second to encode; above, see whether it can fit before trying
TOO_LONG = "The input (more than {0} tokens) is longer than the model's context length ({0} tokens)."
NO_TOKENIZER = "the tokenizer is not initialized (--skip-tokenizer-init); send input_ids"
NEED_TOKENIZER = ("stop", "stop_regex", "min_new_tokens")  # parameters that mean nothing without one


class Counters(msgspec.Struct):
    """What this service has done since it started."""

    prompts: int = 0
    prompt_tokens: int = 0
    refused: int = 0


class Encoder:
    """The tokenizer service's work for one model."""

    whole_batches = True  # nothing is kept between two of them

    def __init__(
        self,
        tokenizer: "Tokenizer | None",
        *,
        template: Template | None = None,
        hidden_size: int = 0,
        token_types: bool = False,
        context_length: int | None = None,
    ) -> None:
        """No tokenizer: ids in, ids out. `token_types`: the model tells the two texts of a pair apart."""
        self._tokenizer = tokenizer
        self._template = template
        self._hidden_size = hidden_size
        self._token_types = token_types
        self._context_length = context_length
        self.counters = Counters()

    def step(self, batch: list[Any]) -> list[Message]:
        """Answer what is ours, pass the rest on, keep the order."""
        tokenized = iter(self.tokenize([message for message in batch if isinstance(message, Generate)]))
        return [next(tokenized) if isinstance(message, Generate) else self._command(message) for message in batch]

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """The end of a request one of whose messages could not be handled."""
        self.counters.refused += isinstance(message, Generate)
        ending = end_of(message, finish)
        return [ending] if ending else []

    def tokenize(self, batch: list[Generate]) -> list[Message]:
        """One message per request, in order; all texts among them are encoded together."""
        prompts = [self._prompt(message) for message in batch]
        encodings = iter(self._encode([prompt for prompt in prompts if isinstance(prompt, Prompt)]))
        return [
            self._finished(message, next(encodings) if isinstance(prompt, Prompt) else prompt)
            for message, prompt in zip(batch, prompts, strict=True)
        ]

    def _command(self, message: Message) -> Message:
        match message:
            case Tokenize():
                return self._reply(message)
            case Probe():
                message.counters["tokenizer"] = msgspec.structs.asdict(self.counters)
        return message

    def _prompt(self, message: Generate) -> Prompt | RequestError | None:
        """The text to encode, None where the prompt is not text, or why the request is refused."""
        try:
            self._check(message.request.params)
            prompt = prompt_of(message, self._template)
            if prompt is not None:
                self._check_text(prompt)
                prompt = self._pre_cut(prompt, message.request)
        except RequestError as error:
            return error
        return prompt

    def _check(self, params: SamplingParams) -> None:
        """Refuse stop conditions that the detokenizer could not carry out."""
        if self._tokenizer is None:
            for field in NEED_TOKENIZER:
                if getattr(params, field):
                    raise RequestError(f"{field} needs a tokenizer (--skip-tokenizer-init is set)", field=field)
        for pattern in params.stop_patterns:
            compile_stop(pattern)

    def _check_text(self, prompt: Prompt) -> None:
        """Refuse what cannot be encoded, and what is sure not to fit the context before time is spent on it."""
        if self._tokenizer is None:
            raise RequestError(NO_TOKENIZER, field="text")
        if prompt.truncated:
            return
        chars = len(prompt.text) if isinstance(prompt.text, str) else sum(map(len, prompt.text))
        if self._context_length is None or chars <= LONG_TEXT_CHARS:
            return
        if chars > self._context_length * self._longest_token_chars:
            raise too_long(TOO_LONG.format(self._context_length), "text")

    def _pre_cut(self, prompt: Prompt, request: Request) -> Prompt:
        """The prompt without text that is sure to be cut off, before time is spent on it."""
        if request.truncate is None or isinstance(prompt.text, tuple) or len(prompt.text) <= LONG_TEXT_CHARS:
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
            return list(self._tokenizer.encode_batch_fast(texts, add_special_tokens=special))
        except Exception as error:  # tokenizers raises nothing narrower; one bad text must not fail the others
            if len(texts) == 1:
                return [RequestError(f"the text cannot be tokenized: {error}", field="text")]
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

    def _reply(self, command: Tokenize) -> Reply:
        try:
            return Reply(id=command.id, body={"tokens": self._ids_of(command)})
        except RequestError as error:
            return Reply(id=command.id, success=False, message=error.message, status=error.kind.status)

    def _ids_of(self, command: Tokenize) -> list[list[int]]:
        prompts = [Prompt(text, command.add_special_tokens) for text in command.texts]
        if command.chat is not None:
            prompts.append(rendered(command.chat, self._template))
        for prompt in prompts:
            self._check_text(prompt)
        ids = []
        for result in self._encode(prompts):
            if isinstance(result, RequestError):
                raise result
            ids.append(result.ids)
        return ids
