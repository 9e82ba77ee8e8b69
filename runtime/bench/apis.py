"""The three APIs that load is put on: their bodies, and what the events of their streams say."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import msgspec

from quartet.runtime.bench.records import History, Turn
from quartet.runtime.client.answers import DECODER, CachedTokens, Delta, Usage, reason_of
from quartet.runtime.client.connection import ErrorDetail


class Settings(NamedTuple):
    """What every request of a run shares."""

    model: str
    temperature: float = 0.0
    ignore_eos: bool = True


class Event(NamedTuple):
    """What one event says: the answer's new part, and the counts where they are in it."""

    text: str = ""
    ids: tuple[int, ...] = ()
    usage: Usage | None = None
    error: str = ""

    @property
    def brings_output(self) -> bool:
        return bool(self.text or self.ids)


class Api(Protocol):
    """One API. `reader` makes a function from the data of an event to an Event; each answer needs its own."""

    path: str

    def body(self, history: History, turn: Turn, settings: Settings) -> dict[str, Any]: ...

    def reader(self) -> Callable[[bytes], Event]: ...

    def remember(self, history: History, turn: Turn, text: str, ids: tuple[int, ...]) -> None: ...


# native


class Meta(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0


class NativeChunk(msgspec.Struct):
    text: str = ""
    output_ids: list[int] = []
    meta_info: Meta = msgspec.field(default_factory=Meta)
    error: ErrorDetail | str | None = None


class NativeReader:
    """Chunks hold all so far, or only what is new where a server was told to: the count of tokens tells which."""

    def __init__(self) -> None:
        self._decoder = msgspec.json.Decoder(NativeChunk)
        self._chars = self._tokens = 0

    def __call__(self, data: bytes) -> Event:
        chunk = self._decoder.decode(data)
        if chunk.error is not None:
            return Event(error=reason_of(chunk.error))
        meta = chunk.meta_info
        whole = len(chunk.output_ids) >= meta.completion_tokens
        ids = tuple(chunk.output_ids[self._tokens :] if whole else chunk.output_ids)
        text = chunk.text[self._chars :] if whole else chunk.text
        self._tokens, self._chars = self._tokens + len(ids), self._chars + len(text)
        return Event(text, ids, Usage(meta.prompt_tokens, meta.completion_tokens, CachedTokens(meta.cached_tokens)))


class Native:
    """/generate, with ids where the prompt is made of them."""

    path = "/generate"

    def body(self, history: History, turn: Turn, settings: Settings) -> dict[str, Any]:
        sampling = {
            "temperature": settings.temperature,
            "max_new_tokens": turn.output_tokens,
            "ignore_eos": settings.ignore_eos,
        }
        prompt = {"input_ids": [*history.ids, *turn.ids]} if turn.ids else {"text": history.text + turn.text}
        return {**prompt, "sampling_params": sampling, "stream": True}

    def reader(self) -> Callable[[bytes], Event]:
        return NativeReader()

    def remember(self, history: History, turn: Turn, text: str, ids: tuple[int, ...]) -> None:
        history.ids += [*turn.ids, *ids]
        history.text += turn.text + text


# OpenAI's


class CompletionChoice(msgspec.Struct):
    text: str = ""


class CompletionChunk(msgspec.Struct):
    choices: list[CompletionChoice] | None = None
    usage: Usage | None = None
    error: ErrorDetail | str | None = None


COMPLETION_DECODER = msgspec.json.Decoder(CompletionChunk)


def shared_fields(turn: Turn, settings: Settings) -> dict[str, Any]:
    """The fields that completions and chat completions share."""
    return {
        "model": settings.model,
        "temperature": settings.temperature,
        "max_tokens": turn.output_tokens,
        "ignore_eos": settings.ignore_eos,
        "stream": True,
        "stream_options": {"include_usage": True},
    }


class Completions:
    """/v1/completions. The first prompt of a session may be ids; later ones are text, for answers come as text."""

    path = "/v1/completions"

    def __init__(self, with_ids: bool) -> None:
        self._with_ids = with_ids

    def body(self, history: History, turn: Turn, settings: Settings) -> dict[str, Any]:
        prompt: str | list[int] = list(turn.ids) if self._with_ids and turn.ids else history.text + turn.text
        return {"prompt": prompt, **shared_fields(turn, settings)}

    def reader(self) -> Callable[[bytes], Event]:
        return read_completion

    def remember(self, history: History, turn: Turn, text: str, ids: tuple[int, ...]) -> None:
        history.text += f"{turn.text}{text}\n"


class ChatCompletions:
    """/v1/chat/completions."""

    path = "/v1/chat/completions"

    def body(self, history: History, turn: Turn, settings: Settings) -> dict[str, Any]:
        messages = [*history.messages, {"role": "user", "content": turn.text}]
        return {"messages": messages, **shared_fields(turn, settings)}

    def reader(self) -> Callable[[bytes], Event]:
        return read_chat

    def remember(self, history: History, turn: Turn, text: str, ids: tuple[int, ...]) -> None:
        history.messages += [{"role": "user", "content": turn.text}, {"role": "assistant", "content": text}]


def read_completion(data: bytes) -> Event:
    chunk = COMPLETION_DECODER.decode(data)
    if chunk.error is not None:
        return Event(error=reason_of(chunk.error))
    return Event("".join(choice.text for choice in chunk.choices or []), usage=chunk.usage)


def read_chat(data: bytes) -> Event:
    """A chunk of a chat completion; a thought is output like any other."""
    chunk = DECODER.decode(data)
    if chunk.error is not None:
        return Event(error=reason_of(chunk.error))
    deltas = [choice.delta or Delta() for choice in chunk.choices or []]
    text = "".join((d.reasoning_content or d.reasoning or "") + (d.content or "") for d in deltas)
    return Event(text, usage=chunk.usage)


def api_named(name: str, turns: int) -> Api:
    """The API of --api, for sessions of so many turns."""
    if name == "native":
        return Native()
    return ChatCompletions() if name == "openai-chat" else Completions(with_ids=turns == 1)
