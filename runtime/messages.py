"""Every message of a request's life.

    gateway ── Generate ──► tokenizer ── Tokenized ──► scheduler ── Tokens ──► detokenizer ── Text ──► gateway

A frame on a socket is a list of messages. A hop handles the messages it knows and forwards the rest. Exactly one
message with `finish` set passes each hop per request; the state behind that hop is dropped there.
Arrays travel as little-endian bytes: token ids as int32, logprobs and vectors as float32.
"""

import struct
from array import array
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.sampling import SamplingParams

GATEWAY, TOKENIZER, SCHEDULER, DETOKENIZER = "gateway", "tokenizer", "scheduler", "detokenizer"
ROLES = (GATEWAY, TOKENIZER, SCHEDULER, DETOKENIZER)  # in ring order
SEVERAL = SCHEDULER  # the role that may have several processes, each with a rank
ATTEMPT_BITS = 20  # a gateway's attempts begin at its epoch shifted by so many: more restarts than one lives to see
ONE_ID = struct.Struct("<i")
IDS_AT_ONCE = 1 << 14  # that one operation goes over
ABORTED = "Aborted"
ABORTED_IN_QUEUE = "Abort before prefill"


class Message(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Base of everything that travels on the ring; concrete classes carry a `tag`."""


class Timeline(msgspec.Struct, kw_only=True, omit_defaults=True):
    """When a traced request passed the hops: `time.monotonic`, one clock for all processes of a machine; 0: not yet."""

    sent_at: float = 0.0  # by the gateway
    tokenized_at: float = 0.0
    queued_at: float = 0.0  # in the scheduler
    started_at: float = 0.0
    first_token_at: float = 0.0
    finished_at: float = 0.0
    text_at: float = 0.0  # the detokenizer has passed the last message on


class LogprobOptions(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Which logprobs a request wants besides those of its output tokens."""

    start: int = -1  # first prompt position scored; -1: none of the prompt
    top: int = 0  # best k per position
    token_ids: list[int] | None = None  # these ids at every returned position
    raw: bool = False  # of token_ids, the logits rather than the logprobs
    text: bool = False  # decode each token
    returned: bool = True  # the logprobs themselves, and not only what follows
    entropy: bool = False  # of the distribution that each output token was drawn from, before top-k, top-p and min-p
    support: bool = False  # the tokens that each could have been, behind those


Place = Literal["before", "inside", "past"]  # of the model's thought


class ThoughtIds(msgspec.Struct, kw_only=True, omit_defaults=True):
    """The tokens that a budget of thought counts by."""

    opening: int  # -1: the model has no token for it
    closing: int
    blanks: list[int] = []  # that may stand before the opening


class Thought(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How the model marks a thought, where its output may begin with one."""

    opening: str
    closing: str
    place: Place = "before"  # where the output begins; the tokenizer knows better where the prompt's end shows it
    limited: bool = True  # where the tokenizer has no token for the closing tag, a thinking_budget is refused
    ids: ThoughtIds | None = None  # by the tokenizer, where the request has a thinking_budget


class Request(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What a request carries through all hops; a hop opens only what it needs."""

    rid: str
    params: SamplingParams
    call: str = ""  # the HTTP call that it came with, where others came with the same
    seed: int = 0  # always set by the gateway; the draw is a function of (seed, position)
    attempt: int = 0  # grows with every restart of a process that the gateway hears of
    rank: int = 0  # of the scheduler that it is sent to, where there are several
    wanted_rank: int | None = None  # the scheduler that the client has chosen
    epoch: int = 0  # of the scheduler that it is sent to; a later one leaves it alone, for it will be sent again
    again: bool = False  # not the first attempt: the scheduler has admitted it before
    task: Literal["generate", "embed"] = "generate"
    logprobs: LogprobOptions | None = None
    stream: bool = False
    adapter: str = ""  # the name of a LoRA adapter; empty: the base model
    extra_key: str = ""  # namespace of the prefix cache
    priority: int = 0
    log_metrics: bool = True
    return_hidden_states: bool = False
    return_prompt_ids: bool = False
    return_routed_experts: bool = False
    routed_experts_start_len: int = 0  # first position whose experts are wanted
    clips_output: bool = False  # a limit of output that exceeds the context is lowered, not refused
    truncate: int | None = None  # tokens of the prompt at most: a longer one is cut, where others would be refused
    truncate_side: Literal["left", "right"] = "right"  # what is cut off
    dimensions: int | None = None  # embed: cut to this many and normalise again
    task_adapter: str = ""  # embed: the task whose adapter of the model's own computes it; "": the base does
    normalize: bool | None = None  # embed: to length 1; None: as the model's files say
    vectors: Literal["own", "tokens", "query", "document"] = "own"  # embed: what the model is made for; one per token
    fill_to: int = 0  # embed: tokens of the model's own stand behind a query that has fewer
    resume_ids: bytes = b""  # output ids that the client already has (replay after a restart)
    thought: Thought | None = None  # a JSON schema constrains what stands behind it


class Chat(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A conversation to be rendered by the model's chat template in the tokenizer."""

    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]] | None = None
    documents: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    template_kwargs: dict[str, Any] = {}
    as_it_is: bool = False  # its messages are no turns: a template that refuses them gets no others


class Generate(Message, tag="generate", kw_only=True):
    """Gateway → tokenizer. Exactly one of text, input_ids, embeds and chat is given."""

    request: Request
    text: str | None = None
    text_pair: str | None = None  # cross-encoders: the document beside the query
    input_ids: bytes = b""
    embeds: bytes = b""  # float32 (positions, hidden)
    chat: Chat | None = None
    times: Timeline | None = None  # None: the request is not traced; likewise in the other messages


class Tokenized(Message, tag="tokenized", kw_only=True):
    """Tokenizer → scheduler."""

    request: Request
    prompt_ids: bytes
    token_types: bytes = b""  # int32, for cross-encoders that have them
    attended: int = 0  # tokens that others see, the first ones; 0: all
    embeds: bytes = b""  # float32 (positions, hidden); prompt_ids are placeholders then
    times: Timeline | None = None


class Finish(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Why a request ended."""

    reason: Literal["stop", "length", "abort", "error"]
    matched: int | str | None = None  # stop: the id, string or pattern
    spoken: bool = False  # stop: the matched id completes a grammar and belongs to the text
    length: int | None = None  # length: the limit that was reached
    message: str = ""  # abort, error
    status: int = 500  # error: HTTP status
    type_name: str = ""  # error: OpenAI-style type
    field: str | None = None  # error: what of the request was at fault
    code: str | None = None  # error: OpenAI's word for it

    @classmethod
    def failed(cls, error: RequestError) -> "Finish":
        """The end of a request that was refused or failed."""
        kind = error.kind
        return cls(
            reason="error",
            message=error.message,
            status=kind.status,
            type_name=kind.type_name,
            field=error.field,
            code=error.code,
        )

    @classmethod
    def internal(cls, message: str) -> "Finish":
        return cls.failed(RequestError(message, Kind.INTERNAL))


class Logprobs(msgspec.Struct, kw_only=True, omit_defaults=True):
    """Logprobs of a run of positions. NaN stands for `none` (a position with no predecessor)."""

    ids: bytes  # int32 (positions,)
    values: bytes  # float32 (positions,)
    top_ids: bytes = b""  # int32 (positions, k)
    top_values: bytes = b""  # float32 (positions, k)
    asked_values: bytes = b""  # float32 (positions, asked ids)
    # of output positions
    entropies: bytes = b""  # float32 (positions,), in nats
    support_counts: bytes = b""  # int32 (positions,)
    support_ids: bytes = b""  # int32: the ids of each position's support, side by side
    support_values: bytes = b""  # float32 (positions,): the token's logprob among its support
    # filled by the detokenizer where the request wants text
    texts: list[bytes] | None = None  # UTF-8; of a token that is part of a character, its part
    top_texts: list[bytes] | None = None  # flat, (positions * k)
    asked_texts: list[bytes] | None = None  # (asked ids,)
    unspoken: list[int] = []  # positions whose token has no part in the answer's text


class Drafts(msgspec.Struct, kw_only=True, omit_defaults=True):
    """How many tokens of a request a decode step had drafted, and how many of the ids it gave were among them."""

    proposed: int = 0
    correct: int = 0


class Tokens(Message, tag="tokens", kw_only=True):
    """Scheduler → detokenizer: what one step made for one request."""

    rid: str
    attempt: int = 0
    rank: int = 0  # of the scheduler that has made this
    request: Request | None = None  # with the first message of a request
    prompt_tail: bytes = b""  # with the first message: the last prompt ids, for incremental decoding
    prompt_ids: bytes = b""  # with the first message: all of them, where they were asked for
    ids: bytes = b""  # new output ids
    logprobs: Logprobs | None = None  # of `ids`
    input_logprobs: Logprobs | None = None  # once, when the prompt is done
    prompt_tokens: int = 0
    cached_tokens: int = 0
    retractions: int = 0
    queue_s: float | None = None  # with the first message of a request that was started: how long it had waited
    weight_version: str = ""  # that made `ids`
    adapter_version: str = ""  # of the request's adapter, likewise
    vector: bytes = b""  # embed: float32; several side by side for a model that has one for each token
    vector_ids: bytes = b""  # embed: int32, the vocabulary's ids that the numbers belong to, where they are weights
    scalar: bool = False  # embed: the vector is one bare number (cross-encoder)
    hidden_states: bytes = b""  # float32 (positions, hidden) of this message
    hidden_size: int = 0
    routed_experts: bytes = b""  # int32 (tokens - 1 - start, layers, top_k), with finish
    drafts: Drafts | None = None  # with every decode step of a server that speculates
    times: Timeline | None = None  # with the first message of a request and with the last
    finish: Finish | None = None


class Text(Message, tag="text", kw_only=True):
    """Detokenizer → gateway: the same step, decoded. `tokens.request` and `tokens.prompt_tail` are dropped."""

    text: str = ""  # new characters
    place: Place | None = None  # with the first message of a request that may think: where its output begins
    tokens: Tokens


class Reply(Message, tag="reply", kw_only=True):
    """The answer to a control command, on its way to the gateway."""

    id: str
    rank: int = 0  # of the scheduler that answers
    success: bool = True
    message: str = ""
    status: int = 200
    field: str | None = None  # of a refusal, as in RequestError; so is the code
    code: str | None = None
    body: dict[str, Any] | None = None


class Prepared(Message, tag="prepared", kw_only=True):
    """Scheduler → gateway: new weights are staged and checked; whether they serve is for the gateway to decide.

    Said once a second until `DecideChange` comes.
    """

    id: str  # of the command
    rank: int = 0
    weight_files: str = ""  # names what was read, of new weights


class Facts(Message, tag="facts", kw_only=True):
    """Scheduler → gateway, at its start and at the gateway's: what the loaded model and its memory allow."""

    rank: int = 0  # of the scheduler
    epoch: int = 0  # which incarnation of it speaks
    pid: int = 0  # its process
    max_total_num_tokens: int
    max_req_input_len: int  # longest prompt that can ever be served
    context_length: int
    vocab_size: int
    memory_usage: dict[str, float] = {}
    state: dict[
        str, Any
    ] = {}  # model_path, weight_version, weight_files (weights/record.py), paused, asleep, lacks, sleeping, adapters
    # (runtime/adapters.py); those that were unloaded and are kept for requests that may come again: unloaded_adapters,
    # name → version


class Restarted(Message, tag="restarted", kw_only=True):
    """First word of a service that was started again: what was on its way through the one before is gone.

    It goes on round the ring to the gateway; the gateway's own goes to the scheduler, which ends the requests of the
    gateway before and answers with its Facts. A scheduler says its Facts instead.
    """

    role: str
    rank: int = 0  # gateway: the scheduler that is asked
    least_attempt: int = 0  # gateway: of its own requests


RingMessage = Generate | Tokenized | Tokens | Text | Reply | Prepared | Facts | Restarted


def process_key(role: str, rank: int) -> str:
    """Names a process in the run directory: the role, and the rank of all but the first of the role."""
    return f"{role}-{rank}" if rank else role


def title_of(role: str, rank: int, of_role: int) -> str:
    """A process's name for people: its role, and its rank where the role has several."""
    return f"{role} DP{rank}" if of_role > 1 else role


def processes(schedulers: int) -> dict[str, str]:
    """The processes of a server with so many schedulers, in ring order: title → key."""
    counts = {role: schedulers if role == SEVERAL else 1 for role in ROLES}
    return {
        title_of(role, rank, count): process_key(role, rank) for role, count in counts.items() for rank in range(count)
    }


def pack_id(id: int) -> bytes:
    """`pack_ids([id])`, as most steps need it."""
    return ONE_ID.pack(id)


def pack_ids(ids: Iterable[int]) -> bytes:
    """Token ids as little-endian int32 bytes."""
    if not isinstance(ids, list) or len(ids) <= IDS_AT_ONCE:
        return array("i", ids).tobytes()
    packed = array("i")
    for start in range(0, len(ids), IDS_AT_ONCE):  # so that other threads can run in between
        packed.extend(ids[start : start + IDS_AT_ONCE])
    return packed.tobytes()


def unpack_ids(data: bytes) -> "array[int]":
    """The reverse of pack_ids; raises ValueError when the length is not a multiple of 4."""
    ids = array("i")
    ids.frombytes(data)
    return ids


def first_outside(ids: "array[int]", vocab_size: int) -> int | None:
    """The first id that is not of the vocabulary."""
    for start in range(0, len(ids), IDS_AT_ONCE):
        part = ids[start : start + IDS_AT_ONCE]
        if max(part) >= vocab_size or min(part) < 0:
            return next(token for token in part if not 0 <= token < vocab_size)
    return None
