"""What a step's result leaves with its sequence, and what the request is told of it. No queue, no pages, no slots."""

from quartet.runtime.messages import Finish, pack_ids
from quartet.scheduler_service.core import rules
from quartet.scheduler_service.core.logprobs import in_a_row, joined
from quartet.scheduler_service.core.plan import Result, Slice, Update
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.stats import Stats


def keep_scores(part: Slice, result: Result) -> None:
    """Keep what was computed beside the tokens until it is told: logprobs, hidden states, chosen experts."""
    sequence = part.sequence
    if result.input_logprobs:
        sequence.scored.append(result.input_logprobs)
        sequence.input_scored = max(sequence.input_scored, min(part.end, sequence.prompt_len - 1))
    if result.hidden_states:
        sequence.hidden.add(part.start, part.end, result.hidden_states)
    if result.routed_experts:
        sequence.routed.add(part.start, part.end, result.routed_experts)


def accept(part: Slice, result: Result, stats: Stats) -> Finish | None:
    """Take in the tokens that a draft has brought, up to one that ends the request; the others leave the result."""
    sequence, tokens, finish = part.sequence, result.tokens or [], None
    count, correct = 0, len(tokens) - 1
    while count < len(tokens) and finish is None:
        sequence.ids.append(tokens[count])
        finish = rules.finish_after_last(sequence)
        count += 1
    result.tokens, result.logprobs = tokens[:count], result.logprobs and result.logprobs[:count]
    sequence.computed = part.start + count  # what was computed behind it is of drafts that were wrong
    stats.proposed_drafts += len(part.drafts)
    stats.correct_drafts += count - 1
    if sequence.drafter:
        sequence.drafter.learn(len(part.drafts), correct)
    return finish


def update_of(sequence: Sequence, result: Result) -> Update:
    """What the request is told. Takes out the hidden states that were kept, and says the first thing once."""
    update = Update(sequence, not sequence.opened)
    sequence.opened = True
    if result.tokens is not None:
        update.ids = pack_ids(result.tokens)
        update.logprobs = in_a_row(result.logprobs) if result.logprobs else None
    if result.vector:
        update.vector, update.scalar = result.vector, result.scalar
    update.hidden_states = sequence.hidden.take()
    if update.first and sequence.request.logprobs:
        update.input_logprobs = joined(sequence)
    return update
