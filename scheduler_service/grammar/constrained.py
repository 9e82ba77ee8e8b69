"""Requests whose output a grammar constrains: they wait here until it is compiled, and only then are they queued."""

from typing import Protocol

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Request, Tokenized, unpack_ids
from quartet.scheduler_service.grammar.matchers import Grammar
from quartet.scheduler_service.grammar.source import behind_thought

Decided = tuple[Tokenized, Grammar | RequestError]  # a request that need not wait any longer, and its grammar
NO_GRAMMARS = "this server does not constrain output"


class Pool(Protocol):
    """Compiles grammars beside the loop (quartet.scheduler_service.grammar.pool.GrammarPool)."""

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None: ...

    def cancel(self, rid: str) -> None: ...

    def ready(self) -> list[tuple[str, Grammar | RequestError]]: ...


class WaitingRoom:
    """Constrained requests that are not queued yet, by rid."""

    def __init__(self, pool: Pool | None) -> None:
        """No pool: constrained requests are refused."""
        self._pool = pool
        self._messages: dict[str, Tokenized] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def requests(self) -> list[Request]:
        return [message.request for message in self._messages.values()]

    def hold(self, message: Tokenized) -> None:
        """Let a request wait for its grammar; a later attempt takes an earlier one's place. Raises RequestError."""
        grammar, rid = message.request.params.grammar, message.request.rid
        assert grammar is not None, rid
        if self._pool is None:
            raise RequestError(NO_GRAMMARS, field=grammar[0])
        waiting = self._messages.get(rid)
        if waiting is not None and message.request.attempt <= waiting.request.attempt:
            return
        self.drop(rid)
        self._messages[rid] = message
        self._pool.submit(rid, *wanted(message.request, *grammar), message.request.call)

    def drop(self, rid: str) -> Tokenized | None:
        """Take out a request that is not to wait any longer, if it is here."""
        message = self._messages.pop(rid, None)
        if message is not None and self._pool is not None:
            self._pool.cancel(rid)
        return message

    def decided(self) -> list[Decided]:
        """The requests whose grammar was compiled or refused since the last call."""
        if self._pool is None or not self._messages:
            return []
        return [(self._messages.pop(rid), outcome) for rid, outcome in self._pool.ready()]


def is_complete(message: Tokenized, grammar: Grammar) -> bool:
    """Whether what a resumed request has generated leaves nothing to generate.

    Raises RequestError where that does not follow the grammar: the worker takes it for granted.
    """
    return grammar.matcher(unpack_ids(message.request.resume_ids)).finished


def wanted(request: Request, kind: str, text: str) -> tuple[str, str]:
    """The grammar of the whole output: a schema is for what stands behind the model's thought."""
    if request.thought is None or kind != "json_schema":
        return kind, text
    return kind, behind_thought(text, request.thought)
