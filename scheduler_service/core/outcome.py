"""Applies one slice's result to its sequence, and makes the update that is sent. No queue, no pages, no slots."""

from quartet.runtime.messages import Finish, pack_id, pack_ids
from quartet.scheduler_service.core import rules
from quartet.scheduler_service.core.logprobs import concatenated, take_prompt_logprobs
from quartet.scheduler_service.core.plan import Result, Slice, Update
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.stats import Stats


def store_extras(part: Slice, result: Result) -> None:
    """Store what was computed besides the tokens until it is sent: prompt logprobs, hidden states, chosen experts."""
    sequence = part.sequence
    if result.input_logprobs:
        sequence.scored.append(result.input_logprobs)
        sequence.input_scored = max(sequence.input_scored, min(part.end, sequence.prompt_len - 1))
    if result.hidden_states:
        sequence.hidden.add(part.start, part.end, result.hidden_states)
    if result.routed_experts:
        sequence.routed.add(part.start, part.end, result.routed_experts)


def append_tokens(sequence: Sequence, result: Result) -> Finish | None:
    """Append the tokens of a result, up to one that ends the request; tokens after it leave the result."""
    tokens, finish, count = result.tokens or [], None, 0
    while count < len(tokens) and finish is None:
        sequence.ids.append(tokens[count])
        count += 1
        finish = rules.finish_after_last(sequence, result.complete and count == len(tokens))
    result.tokens, result.logprobs = tokens[:count], result.logprobs and result.logprobs[:count]
    return finish


def accept_draft(part: Slice, result: Result, stats: Stats) -> Finish | None:
    """Append the tokens of a verified draft: see `append_tokens`."""
    sequence, correct = part.sequence, len(result.tokens or ()) - 1
    finish = append_tokens(sequence, result)
    count = len(result.tokens or ())
    sequence.computed = part.start + count  # the KV after it is that of wrong tokens
    stats.proposed_drafts += len(part.drafts)
    stats.correct_drafts += count - 1
    if sequence.drafter:
        sequence.drafter.learn(len(part.drafts), correct)
    return finish


def update_of(sequence: Sequence, result: Result) -> Update:
    """What is sent for the request now. Takes the stored hidden states and, the first time, the prompt logprobs."""
    update = Update(sequence, not sequence.update_sent)
    sequence.update_sent = True
    if (tokens := result.tokens) is not None:
        update.ids = pack_id(tokens[0]) if len(tokens) == 1 else pack_ids(tokens)
        update.logprobs = concatenated(result.logprobs) if result.logprobs else None
    if result.vector:
        update.vector, update.vector_ids, update.scalar = result.vector, result.vector_ids, result.scalar
    if sequence.hidden.parts:
        update.hidden_states = sequence.hidden.take()
    if update.first and sequence.request.logprobs:
        update.input_logprobs = take_prompt_logprobs(sequence)
    return update
