"""One message that cannot be handled ends its own request, and nothing else notices.

Every service hands what it receives to a Guard, message by message. A message is first looked at: whether its bytes
have the lengths that belong together, and whether the attempts and epochs that it claims can exist. Then it is handled.
If either fails, the service gives up on that message alone: it drops what it keeps for the request and sends one
terminal message in its place. The failure is counted and logged.
"""

import logging
import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from math import inf
from typing import Any, Protocol

from quartet.runtime.control import ControlCommand, Probe
from quartet.runtime.limits import MAX_DRAFTED_TOKENS, MAX_FILLED_TOKENS
from quartet.runtime.messages import (
    ATTEMPT_BITS,
    GATEWAY,
    ROLES,
    SCHEDULER,
    Facts,
    Finish,
    Generate,
    Logprobs,
    Message,
    Prepared,
    Reply,
    Request,
    Restarted,
    Text,
    Tokenized,
    Tokens,
    process_key,
)

log = logging.getLogger(__name__)

NUMBER_BYTES = 4
EVERY_EPOCH = 1 << 60
SIGN = 0x80  # of the last byte of a little-endian integer
SHOWN_CHARS = 200  # of an error, in the log
TRACEBACK_EVERY_S = 60.0
NOT_HANDLED = "Internal error: the {role} could not handle a message of the request ({reason})."


class Malformed(ValueError):
    """A message is typed correctly, but its content cannot be what a service has sent."""


class Announced:
    """Which incarnations of the services exist, as the launcher says; a message that names another is not believed."""

    def __init__(self, newest: Callable[[str], int] = lambda key: EVERY_EPOCH, schedulers: int = 1) -> None:
        """`newest`: the epoch of a process's last incarnation, by key. It is asked only for epochs not heard of so far.

        Without it every epoch is believed, as befits a service that no launcher has started.
        """
        self._newest = newest
        self._schedulers = schedulers
        self._known: defaultdict[str, int] = defaultdict(int)  # by key

    def check_rank(self, rank: int) -> None:
        """Raise Malformed for a scheduler that is not there."""
        if not 0 <= rank < self._schedulers:
            raise Malformed(f"no scheduler has rank {rank}; there are {self._schedulers}")

    def check_epoch(self, role: str, epoch: int, rank: int = 0) -> None:
        """Raise Malformed for an epoch that never was, and for a scheduler that is not there."""
        if rank:
            self.check_rank(rank)
        key = process_key(role, rank)
        known = self._known[key]
        if 0 <= epoch <= known:
            return
        if epoch > known:
            known = self._known[key] = max(known, self._newest(key))
        if not 0 <= epoch <= known:
            raise Malformed(f"no {role} has epoch {epoch}; the newest has {known}")


class Service(Protocol):
    """A text service as its loop sees it."""

    whole_batches: bool  # a batch may be handled again, message by message, when it failed as a whole

    @property
    def patience_s(self) -> float | None:
        """How long the next step may wait for messages; None: there is nothing to do without one."""
        ...

    def step(self, batch: list[Any]) -> list[Message]:
        """What the messages lead to, in order; an empty batch goes on with what was put off.

        Raises whatever a bad message makes it raise.
        """
        ...

    def give_up(self, message: Any, finish: Finish) -> list[Message]:
        """Drop what is kept for the message's request; returns its end, as this service sends it."""
        ...


class Guard:
    """Of one service."""

    def __init__(self, role: str, announced: Announced, give_up: Callable[[Any, Finish], list[Message]]) -> None:
        self.failed = 0  # messages
        self._role = role
        self._announced = announced
        self._give_up = give_up
        self._shown_at = -TRACEBACK_EVERY_S

    def batch(self, service: Service, messages: list[Any]) -> list[Message]:
        """A text service's answer to everything that waited."""
        if service.whole_batches or not messages:
            try:
                for message in messages:
                    self.check_message(message)
                return self._counted(service.step(messages))
            except Exception as error:
                log.debug("a batch of %d failed: %r", len(messages), error)
        return self._counted(self.each(messages, lambda message: service.step([message])))

    def each(self, messages: Iterable[Any], handle: Callable[[Any], list[Message]]) -> list[Message]:
        """What the messages lead to, in order."""
        out: list[Message] = []
        for message in messages:
            try:
                self.check_message(message)
                out += handle(message)
            except Exception as error:
                out += self.failure(message, error)
        return out

    def check_message(self, message: Any) -> None:
        """Raise Malformed for what no service can have sent."""
        if look := LOOKS.get(type(message)):
            look(message, self._announced)
        elif isinstance(message, ControlCommand) and (message.epoch is not None or message.rank):
            self._announced.check_epoch(SCHEDULER, message.epoch or 0, message.rank)

    def failure(self, message: Any, error: Exception) -> list[Message]:
        """Count and log that a message could not be handled, and end its request."""
        self.failed += 1
        name, now = type(message).__name__, time.monotonic()
        known = now - self._shown_at < TRACEBACK_EVERY_S  # a flood of them must not become one of tracebacks
        self._shown_at = self._shown_at if known else now
        shown = repr(str(error)[:SHOWN_CHARS])
        log.error(
            "The %s could not handle a %s message (%d so far): %s: %s",
            *(self._role, name, self.failed, type(error).__name__, shown),
            exc_info=None if known or isinstance(error, Malformed) else error,
        )
        reason = NOT_HANDLED.format(role=self._role, reason=type(error).__name__)
        return self._give_up(message, Finish.internal(reason))

    def _counted(self, messages: list[Message]) -> list[Message]:
        """Probes tell how many messages have failed here."""
        for message in messages:
            if type(message) is Probe and self._role in message.counters:
                message.counters[self._role]["failed_messages_total"] = self.failed
        return messages


# looks: cheap, since every message of every hop passes them


def check_ids(data: bytes, name: str) -> int:
    """How many token ids these bytes are. Raises Malformed where they are none."""
    count, rest = divmod(len(data), NUMBER_BYTES)
    if rest:
        raise Malformed(f"{name} has {len(data)} bytes, which are no whole numbers")
    if data and max(data[3::NUMBER_BYTES]) >= SIGN:
        raise Malformed(f"{name} has a negative id")
    return count


def check_rows(data: bytes, rows: int, name: str) -> int:
    """How many numbers each of so many rows has."""
    count, rest = divmod(len(data), NUMBER_BYTES)
    if rest or (count % rows if rows else count):
        raise Malformed(f"{name} has {len(data)} bytes for {rows} rows")
    return count // rows if rows else 0


def check_request(request: Request, announced: Announced) -> None:
    check_ids(request.resume_ids, "resume_ids")
    if not 0 <= request.fill_to <= MAX_FILLED_TOKENS:
        raise Malformed(f"no prompt is filled up to {request.fill_to} tokens")
    check_attempt(request.attempt, announced)
    announced.check_epoch(SCHEDULER, request.epoch, request.rank)


def check_attempt(attempt: int, announced: Announced) -> None:
    """Each gateway counts attempts from a number of its own."""
    announced.check_epoch(GATEWAY, attempt >> ATTEMPT_BITS)


def check_generate(message: Generate, announced: Announced) -> None:
    check_request(message.request, announced)
    check_ids(message.input_ids, "input_ids")


def check_tokenized(message: Tokenized, announced: Announced) -> None:
    check_request(message.request, announced)
    positions = check_ids(message.prompt_ids, "prompt_ids")
    if message.token_types and check_ids(message.token_types, "token_types") != positions:
        raise Malformed("token_types has another length than prompt_ids")
    if not 0 <= message.attended <= positions:
        raise Malformed(f"{message.attended} of {positions} tokens cannot be seen")
    check_rows(message.embeds, positions, "embeds")


def check_tokens(tokens: Tokens, announced: Announced) -> None:
    """Raise Malformed where the parts of a Tokens message do not fit each other."""
    if tokens.rank:
        announced.check_rank(tokens.rank)
    if tokens.attempt >> ATTEMPT_BITS:
        check_attempt(tokens.attempt, announced)
    if tokens.request is not None:
        check_request(tokens.request, announced)
        if (tokens.request.rid, tokens.request.attempt) != (tokens.rid, tokens.attempt):
            raise Malformed("the request that comes with tokens is another one")
        check_ids(tokens.prompt_tail, "prompt_tail")
    made = check_ids(tokens.ids, "ids")
    if tokens.logprobs is not None and check_logprobs(tokens.logprobs) != made:
        raise Malformed("logprobs are of other tokens")
    if tokens.input_logprobs is not None:
        check_logprobs(tokens.input_logprobs)
    if tokens.vector:
        check_rows(tokens.vector, 1, "vector")
    if tokens.vector_ids and check_ids(tokens.vector_ids, "vector_ids") * NUMBER_BYTES != len(tokens.vector):
        raise Malformed("vector_ids are not of the vector's numbers")
    if tokens.hidden_states and (tokens.hidden_size <= 0 or len(tokens.hidden_states) % (4 * tokens.hidden_size)):
        raise Malformed("hidden_states are no whole rows")
    if tokens.drafts is not None and not 0 <= tokens.drafts.correct <= tokens.drafts.proposed <= MAX_DRAFTED_TOKENS:
        raise Malformed("more drafts were right than were made, or more were made than ever are")
    if tokens.prompt_tokens < 0 or tokens.cached_tokens < 0 or tokens.retractions < 0:
        raise Malformed("a count is negative")
    if tokens.queue_s is not None and not 0 <= tokens.queue_s < inf:
        raise Malformed("the time in the queue is no time")


def check_logprobs(logprobs: Logprobs) -> int:
    """How many positions they are of."""
    positions = check_ids(logprobs.ids, "logprobs.ids")
    if check_rows(logprobs.values, positions, "logprobs.values") != bool(positions):
        raise Malformed("logprobs.values has another length than logprobs.ids")
    best = check_ids(logprobs.top_ids, "logprobs.top_ids")
    if best * NUMBER_BYTES != len(logprobs.top_values) or (best % positions if positions else best):
        raise Malformed("logprobs.top_values does not fit logprobs.top_ids")
    asked = check_rows(logprobs.asked_values, positions, "logprobs.asked_values")
    for texts, count in ((logprobs.texts, positions), (logprobs.top_texts, best), (logprobs.asked_texts, asked)):
        if texts is not None and len(texts) != count and positions:
            raise Malformed("logprobs have other texts than ids")
    return positions


def check_text(text: Text, announced: Announced) -> None:
    check_tokens(text.tokens, announced)


def check_facts(facts: Facts, announced: Announced) -> None:
    announced.check_epoch(SCHEDULER, facts.epoch, facts.rank)


def check_answer(answer: Reply | Prepared, announced: Announced) -> None:
    announced.check_rank(answer.rank)


def check_restarted(restarted: Restarted, announced: Announced) -> None:
    if restarted.role not in ROLES:
        raise Malformed(f"{restarted.role[:SHOWN_CHARS]!r} is no service")
    announced.check_rank(restarted.rank)
    announced.check_epoch(GATEWAY, restarted.least_attempt >> ATTEMPT_BITS)


LOOKS: dict[type, Callable[[Any, Announced], None]] = {
    Generate: check_generate,
    Tokenized: check_tokenized,
    Tokens: check_tokens,
    Text: check_text,
    Reply: check_answer,
    Prepared: check_answer,
    Facts: check_facts,
    Restarted: check_restarted,
}


def end_of(message: Any, finish: Finish) -> Message | None:
    """The terminal message that ends the request a message belongs to; None where it belongs to none.

    An Abort has none either: nobody waits for an answer to it.
    """
    match message:
        case Generate(request=request) | Tokenized(request=request):
            return Tokens(rid=request.rid, attempt=request.attempt, finish=finish)
        case Tokens(rid=rid, attempt=attempt):
            return Tokens(rid=rid, attempt=attempt, finish=finish)
        case Text(tokens=tokens):
            return Text(tokens=Tokens(rid=tokens.rid, attempt=tokens.attempt, finish=finish))
        case Reply(id=id, rank=rank) | ControlCommand(id=id, rank=rank) if id:
            return Reply(id=id, rank=rank, success=False, status=finish.status, message=finish.message)
        case _:
            return None
