"""What a request may ask for, and when it ends: a message in, a Sequence or a RequestError out."""

from array import array
from dataclasses import dataclass

from quartet.runtime.errors import EMPTY_IDS, RequestError, too_long
from quartet.runtime.messages import Finish, Request, Tokenized, unpack_ids
from quartet.runtime.vocabulary import check_input_ids, check_logprob_options, check_logprob_start
from quartet.scheduler_service.core.drafts import DraftOptions, Grammar, drafter_of
from quartet.scheduler_service.core.plan import NAN_HAPPENED, Result
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.snapshots import SnapshotOptions
from quartet.scheduler_service.core.thought_budget import thought_budget_of


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannerConfig:
    """The planner's part of the configuration, with every default resolved."""

    page_size: int
    total_pages: int
    max_running: int
    context_length: int
    vocab_size: int
    eos_ids: frozenset[int] = frozenset()
    chunked_prefill_size: int = -1  # tokens of one step; -1: whole prompts
    max_prefill_tokens: int = 16384  # prompt tokens of one step
    policy: str = "fcfs"
    low_values_first: bool = False  # of priorities
    preemption_threshold: int | None = None  # a greater difference of priorities preempts; None: no preemption
    waiting_timeout_s: float | None = None
    running_timeout_s: float | None = None
    max_queued: int | None = None
    reuse_prefixes: bool = True
    snapshots: SnapshotOptions | None = None  # of a model with recurrent layers
    drafts: DraftOptions | None = None  # None: no speculation
    max_adapters: int = 8  # different LoRA adapters that run at once
    clips_output: bool = False  # a limit of output that exceeds the context is lowered, not refused
    default_new_tokens: int | None = 128  # the client may not have chosen this limit: it is lowered, never refused

    @property
    def total_tokens(self) -> int:
        return self.page_size * self.total_pages

    @property
    def max_input_len(self) -> int:
        """The longest prompt that can be served and still give one token."""
        return min(self.context_length, self.total_tokens) - 1


def sequence_of(message: Tokenized, config: PlannerConfig, now: float, grammar: Grammar | None = None) -> Sequence:
    """The state of a new request. Raises RequestError with the client's message when it cannot be served."""
    request = message.request
    ids, resumed = ids_of(message.prompt_ids), ids_of(request.resume_ids)
    if not ids:
        raise RequestError(EMPTY_IDS, field="input_ids")
    check_length(request, len(ids), config)  # first: the ids of a prompt that is too long are not looked at
    if not message.embeds:
        check_input_ids(ids, config.vocab_size)
    check_input_ids(resumed, config.vocab_size)
    if request.logprobs:
        check_logprob_start(request.logprobs, len(ids))
        check_logprob_options(request.logprobs, config.vocab_size)  # as the gateway has: no request reaches this
    limit = output_limit(request, len(ids), config)
    sequence = Sequence(
        request=request,
        ids=ids + resumed[:limit],
        prompt_len=len(ids),
        arrived_at=now,
        token_types=message.token_types,
        attended=message.attended,
        times=message.times,
        embeds=message.embeds,
        limit=limit,
        stop_ids=stop_ids(request, config),
        grammar=grammar,
        drafter=drafter_of(request, config.drafts, grammar, len(ids)),
        thought_budget=thought_budget_of(request, len(ids)),
        priority=-request.priority if config.low_values_first else request.priority,
    )
    if resumed:  # the client has the prompt's logprobs already, and all hidden states but the last
        sequence.input_scored = len(ids)
        sequence.hidden.end = len(sequence.ids) - 1
    return sequence


def ids_of(data: bytes) -> "array[int]":
    """The token ids of packed int32 bytes. Raises RequestError."""
    try:
        return unpack_ids(data)
    except ValueError as error:
        raise RequestError("input_ids are not whole int32 values.", field="input_ids") from error


def check_length(request: Request, prompt_len: int, config: PlannerConfig) -> None:
    """Raise RequestError unless the prompt, and prompt plus output, fit the context and the KV pool."""
    asked = 0 if request.task == "embed" else request.params.max_new_tokens
    first = 0 if asked == 0 else 1  # a request for output needs room for one token at least
    if prompt_len + first > config.context_length:
        raise too_long(
            f"The input ({prompt_len} tokens) is longer than the model's context length "
            f"({config.context_length} tokens).",
            field="prompt",
        )
    if prompt_len + first > config.total_tokens:
        raise too_long(
            f"Input length ({prompt_len} tokens) exceeds the maximum allowed length ({config.total_tokens - first} "
            "tokens). Use a shorter input or enable --allow-auto-truncate.",
            field="prompt",
        )
    if asked in (None, config.default_new_tokens) or config.clips_output or request.clips_output:
        return
    if prompt_len + asked > config.context_length:
        raise too_long(
            f"Requested token count exceeds the model's maximum context length of {config.context_length} tokens. "
            f"You requested a total of {prompt_len + asked} tokens: {prompt_len} tokens from the input messages and "
            f"{asked} tokens for the completion. Please reduce the number of tokens in the input messages or the "
            "completion to fit within the limit.",
            field="max_new_tokens",
        )


def output_limit(request: Request, prompt_len: int, config: PlannerConfig) -> int:
    """Output tokens at most, so that the sequence fits the context and, running by itself, the pool."""
    if request.task == "embed":
        return 0
    room = min(config.context_length, config.total_tokens) - prompt_len
    asked = request.params.max_new_tokens
    return room if asked is None else min(asked, room)


def stop_ids(request: Request, config: PlannerConfig) -> frozenset[int]:
    """The token ids that end the request."""
    if request.params.ignore_eos:
        return frozenset()
    return config.eos_ids.union(own) if (own := request.params.stop_token_ids) else config.eos_ids


def finish_after_last(sequence: Sequence, complete: bool = False) -> Finish | None:
    """How the request ends with its last token, or None; a stop token has precedence over the length.

    `complete`: its grammar allows nothing more.
    """
    output_len, last = sequence.output_len, sequence.ids[-1]
    if output_len and last in sequence.stop_ids:
        return Finish(reason="stop", matched=last)
    if complete:
        return Finish(reason="stop", matched=last, spoken=True)
    if output_len >= sequence.limit:
        return Finish(reason="length", length=sequence.limit)
    return None


def failure(result: Result) -> Finish:
    """The end of a request that the worker could not compute."""
    if result.error == NAN_HAPPENED:
        return Finish(reason="stop", matched=NAN_HAPPENED)
    return Finish.failed(RequestError(result.error, result.error_kind))


def reusable_tokens(sequence: Sequence) -> int:
    """Tokens of a cached prefix that may be used: at least one is computed, and every position still to be scored."""
    if sequence.request.return_hidden_states or sequence.request.return_routed_experts:
        return 0
    longest = len(sequence.ids) - 1
    options = sequence.request.logprobs
    if options is None or options.start < 0:
        return longest
    return min(longest, max(options.start, sequence.input_scored))


def routed_experts(sequence: Sequence) -> bytes:
    """The experts of all positions but the last, from the requested start on; fewer where fewer were computed."""
    known, data = sequence.routed.end, sequence.routed.take()
    width = len(data) // known if known else 0
    return data[sequence.request.routed_experts_start_len * width : (len(sequence.ids) - 1) * width]


def score_from(sequence: Sequence, start: int, end: int) -> int:
    """First prompt position in (start, end] whose logprob is requested and not yet returned, or -1.

    Position `options.start` itself is never scored: the answer has null there.
    """
    options = sequence.request.logprobs
    if options is None or options.start < 0:
        return -1
    first = max(start, options.start, sequence.input_scored) + 1
    return first if first <= min(end, sequence.prompt_len - 1) else -1
