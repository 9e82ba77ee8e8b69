"""The messages that the scheduler sends for requests: the output of a step, or an end. They go to the detokenizer."""

from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Finish, Message, Prepared, Reply, Tokenized, Tokens, pack_ids
from quartet.scheduler_service.core.plan import Update

SIGNED = (Tokens, Reply, Prepared)  # say which scheduler they come from
PROMPT_TAIL = 8  # prompt ids sent to the detokenizer, which decodes the first output with them as context


def check_hidden_states(message: Tokenized, hidden_size: int) -> None:
    """Raise RequestError if the hidden states of the prompt, or its tokens' vectors, would not fit into one message."""
    needed = len(message.prompt_ids) * hidden_size  # bytes: four per id in prompt_ids, four per float32
    wanted, field = message.request.return_hidden_states, "return_hidden_states"
    if message.request.vectors != "own":
        wanted, field = True, "text"
    if wanted and needed > limits.MAX_HIDDEN_STATE_BYTES:
        raise RequestError(
            f"The hidden states of the prompt would take {needed} bytes; {limits.MAX_HIDDEN_STATE_BYTES} are allowed.",
            field=field,
        )


def unqueued_end(message: Tokenized, finish: Finish) -> Tokens:
    """The first and last message of a request that was never queued."""
    return Tokens(
        rid=message.request.rid,
        attempt=message.request.attempt,
        request=message.request,
        prompt_tokens=len(message.prompt_ids) // 4,
        finish=finish,
    )


def stamp(tokens: Tokens, update: Update, now: float) -> None:
    """Note when a traced request passed the scheduler, and send that with its first and its last message."""
    sequence, times = update.sequence, update.sequence.times
    if times is None:
        return
    if update.first:
        times.queued_at, times.first_token_at = sequence.arrived_at, now
        times.started_at = sequence.arrived_at + sequence.queue_s if sequence.started else 0.0
    if update.finish is not None:
        times.finished_at = now
    if update.first or update.finish is not None:
        tokens.times = times


def tokens_of(update: Update, weight_version: str, hidden_size: int, adapter_version: str = "") -> Tokens:
    """The output of a step for one request. The first message of a request also carries the request."""
    sequence = update.sequence
    tokens = Tokens(
        rid=sequence.request.rid,
        attempt=sequence.request.attempt,
        ids=update.ids,
        logprobs=update.logprobs,
        input_logprobs=update.input_logprobs,
        prompt_tokens=sequence.prompt_len,
        cached_tokens=sequence.cached_tokens,
        retractions=sequence.retractions,
        weight_version=weight_version,
        adapter_version=adapter_version,
        vector=update.vector,
        vector_ids=update.vector_ids,
        scalar=update.scalar,
        routed_experts=update.routed_experts,
        drafts=update.drafts,
        finish=update.finish,
    )
    if update.first:
        tokens.request = sequence.request
        tokens.queue_s = sequence.queue_s if sequence.started else None
        if sequence.request.return_prompt_ids:
            tokens.prompt_ids = pack_ids(sequence.ids[: sequence.prompt_len])
        tokens.prompt_tail = pack_ids(sequence.ids[max(0, sequence.prompt_len - PROMPT_TAIL) : sequence.prompt_len])
    if update.hidden_states:
        tokens.hidden_states, tokens.hidden_size = update.hidden_states, hidden_size
    return tokens


def behind_facts(told: list[Message], messages: list[Message]) -> list[Message]:
    """The messages, behind the facts where a command is answered: the gateway knows of a change before its client."""
    return [*told, *messages] if any(isinstance(message, Reply) for message in messages) else messages


def signed(messages: list[Message], rank: int) -> list[Message]:
    """The messages, each with the rank of the scheduler that sends it; 0 is what they say by themselves."""
    if rank:
        for message in messages:
            if isinstance(message, SIGNED):
                message.rank = rank
    return messages
