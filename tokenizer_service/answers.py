"""What the tokenizer sends on: tokenized requests, refusals, and the replies to Tokenize."""

import time
from typing import TYPE_CHECKING, NamedTuple

import msgspec

from quartet.runtime import limits
from quartet.runtime.control import Tokenize
from quartet.runtime.errors import EMPTY_IDS, RequestError, not_whole_rows, too_long
from quartet.runtime.messages import Finish, Generate, Reply, Tokenized, Tokens, pack_id, pack_ids, unpack_ids
from quartet.tokenizer_service.jobs import Job
from quartet.tokenizer_service.pairs import types_of
from quartet.tokenizer_service.shorten import cut_ids, picked, places_kept
from quartet.tokenizer_service.thoughts import TAIL_TOKENS, place_of, thought_ids

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

ID_BYTES = 4
FLOAT_BYTES = 4
TOO_MANY = "There are more than {} tokens, which is the most that one call counts."


class Counters(msgspec.Struct):
    """What this service has done since it started."""

    prompts: int = 0
    prompt_tokens: int = 0
    refused: int = 0
    aborted: int = 0  # while they waited here


class Filler(NamedTuple):
    """What stands behind a query that is too short."""

    id: int
    attended: bool  # whether other tokens see it


class AnswerBuilder:
    """Makes messages of encoded texts, and counts them."""

    def __init__(
        self, tokenizer: "Tokenizer | None", hidden_size: int, token_types: bool, filler: Filler | None = None
    ) -> None:
        self._tokenizer = tokenizer
        self._hidden_size = hidden_size
        self._token_types = token_types
        self._filler = filler
        self.counters = Counters()

    def finish(self, message: Generate, encoded: "Encoding | RequestError | None") -> Tokenized | Tokens:
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
        self._locate_thought(message, ids)
        ids, attended = self._filled_up(ids, message.request.fill_to)
        self.counters.prompts += 1
        self.counters.prompt_tokens += len(ids) // ID_BYTES
        if message.times is not None:
            message.times.tokenized_at = time.monotonic()
        return Tokenized(
            request=message.request,
            prompt_ids=ids,
            token_types=types,
            attended=attended,
            embeds=message.embeds,
            times=message.times,
        )

    def _filled_up(self, ids: bytes, size: int) -> tuple[bytes, int]:
        """A query of at least so many tokens, and how many of them are seen; 0: all."""
        given = len(ids) // ID_BYTES
        if self._filler is None or given >= size:
            return ids, 0
        return ids + pack_id(self._filler.id) * (size - given), 0 if self._filler.attended else given

    def _locate_thought(self, message: Generate, ids: bytes) -> None:
        """Note whether the prompt ends before, inside or past the model's thought."""
        thought = message.request.thought
        if thought is None or self._tokenizer is None:
            return
        tail = self._tokenizer.decode(unpack_ids(ids[-ID_BYTES * TAIL_TOKENS :]).tolist(), skip_special_tokens=False)
        place = place_of(tail, thought, message.chat)
        if (
            place == "before"
            and (message.request.params.json_schema or message.request.params.call_grammar)
            and self._tokenizer.token_to_id(thought.opening) is None
        ):
            place = "past"  # whoever learned to think has a token for it: a schema drives no other model into a thought
        limited = message.request.params.thinking_budget is not None and place != "past"
        tags = thought_ids(self._tokenizer, thought) if limited else None
        message.request.thought = msgspec.structs.replace(thought, place=place, ids=tags)

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


def reply_to(job: Job) -> Reply:
    """The answer to a Tokenize: the ids of each text as bytes, for all hops carry them."""
    assert isinstance(job.message, Tokenize)
    id = job.message.id
    found: list[Encoding] = []
    for result in job.results:
        if isinstance(result, RequestError):
            return refusal(id, result)
        if result is not None:
            found.append(result)
    if sum(map(len, found)) > limits.MAX_TOKENIZED:
        many = TOO_MANY.format(limits.MAX_TOKENIZED)
        return refusal(id, RequestError(many) if job.message.chat is None else too_long(many, "messages"))
    return Reply(id=id, body={"tokens": [pack_ids(encoding.ids) for encoding in found]})


def refusal(id: str, error: RequestError) -> Reply:
    """The answer to a Tokenize that is refused."""
    return Reply(
        id=id, success=False, message=error.message, status=error.kind.status, field=error.field, code=error.code
    )
