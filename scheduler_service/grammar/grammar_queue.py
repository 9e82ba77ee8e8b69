"""Requests whose output a grammar constrains. They wait here until it is compiled, before the planner queues them."""

from typing import Protocol

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Request, Tokenized, unpack_ids
from quartet.scheduler_service.grammar.matchers import Grammar
from quartet.scheduler_service.grammar.source import after_thought

Compiled = tuple[Tokenized, Grammar | RequestError]  # a request, with its grammar or the reason why there is none
NO_GRAMMARS = "this server does not constrain output"


class Pool(Protocol):
    """Compiles grammars in the background (quartet.scheduler_service.grammar.pool.GrammarPool)."""

    def submit(self, rid: str, kind: str, text: str, call: str = "") -> None: ...

    def cancel(self, rid: str) -> None: ...

    def ready(self) -> list[tuple[str, Grammar | RequestError]]: ...


class GrammarQueue:
    """Constrained requests whose grammar is being compiled, by rid."""

    def __init__(self, pool: Pool | None) -> None:
        """No pool: constrained requests are refused."""
        self._pool = pool
        self._messages: dict[str, Tokenized] = {}

    def __len__(self) -> int:
        return len(self._messages)

    @property
    def requests(self) -> list[Request]:
        return [message.request for message in self._messages.values()]

    def put(self, message: Tokenized) -> None:
        """Start to compile the grammar of a request; a later attempt replaces an earlier one. Raises RequestError."""
        grammar, rid = message.request.params.grammar, message.request.rid
        assert grammar is not None, rid
        if self._pool is None:
            raise RequestError(NO_GRAMMARS, field=grammar[0])
        waiting = self._messages.get(rid)
        if waiting is not None and message.request.attempt <= waiting.request.attempt:
            return
        self.remove(rid)
        self._messages[rid] = message
        self._pool.submit(rid, *output_grammar(message.request, *grammar), message.request.call)

    def remove(self, rid: str) -> Tokenized | None:
        """Take out a request and end the work on its grammar; None where there is no such request."""
        message = self._messages.pop(rid, None)
        if message is not None and self._pool is not None:
            self._pool.cancel(rid)
        return message

    def take_compiled(self) -> list[Compiled]:
        """The requests whose grammar was compiled or refused since the last call."""
        if self._pool is None or not self._messages:
            return []
        return [(self._messages.pop(rid), outcome) for rid, outcome in self._pool.ready()]


def is_complete(message: Tokenized, grammar: Grammar) -> bool:
    """Whether the output of a resumed request is complete by its grammar.

    Raises RequestError where that output does not follow the grammar: the worker does not check it.
    """
    return grammar.matcher(unpack_ids(message.request.resume_ids)).finished


def output_grammar(request: Request, kind: str, text: str) -> tuple[str, str]:
    """Kind and text of the grammar for the whole output: JSON and calls are for what follows the model's thought."""
    if request.thought is None or kind not in ("json_schema", "call_grammar"):
        return kind, text
    return kind, after_thought(text, request.thought)
