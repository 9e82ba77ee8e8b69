"""What the planner decides for one step (Plan), what the worker returns (Result), what the client gets (Update)."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from quartet.runtime.errors import Kind
from quartet.runtime.messages import Drafts, Finish, Logprobs
from quartet.scheduler_service.core.request import Sequence


@dataclass(slots=True)
class Slice:
    """One sequence's share of a step: compute the positions [start, end).

    A decode row has end == start + 1, or more where a grammar has forced tokens. `samples`: the step samples the token
    of position `end`. Where an input token is not in `sequence.ids` yet (overlap), the worker takes the one it sampled
    last for that slot.
    `score_from`: first prompt position in (start, end] whose logprob is requested, or -1.
    `restores`: the snapshot with whose recurrent state the slice begins, or -1; `saves`: (position, snapshot) in order,
    where the state behind that many positions is saved; a model without recurrent layers has neither.
    `drafts`: the input tokens of the last positions, still to be verified; the step samples after each of them too.
    """

    sequence: Sequence
    start: int
    end: int
    samples: bool
    score_from: int = -1
    drafts: tuple[int, ...] = ()
    restores: int = -1
    saves: tuple[tuple[int, int], ...] = ()


@dataclass(slots=True)
class Plan:
    """One step: decode rows of one token, then those of several, then prefill chunks.

    Every position named has its page in `sequence.pages`.
    """

    slices: list[Slice] = field(default_factory=list)
    retracted: list[Sequence] = field(default_factory=list)  # sent back to the queue by this decision
    decodes: int = 0  # how many of the slices, the first ones, are decode rows
    verifications: int = 0  # how many after those have several tokens: forced by a grammar, or drafts to be verified
    cached_tokens: int = 0  # found in the prefix tree by the sequences that this step admits
    usage: float = 0.0  # share of the KV pool held by live requests before this step
    weight_version: str = ""  # of the weights it runs on; set at launch
    adapter_versions: Mapping[str, str] = field(default_factory=dict)  # by name, likewise

    @property
    def tokens(self) -> int:
        return sum(s.end - s.start for s in self.slices)

    @property
    def prefills(self) -> list[Slice]:
        return self.slices[self.decodes + self.verifications :]


NAN_HAPPENED = "NaN happened"  # Result.error of a slice whose logits are not numbers; ends the request with a stop


@dataclass(slots=True)
class Result:
    """What one slice produced. `tokens` is None when the slice did not sample."""

    tokens: list[int] | None = None  # one, one more for each draft that was right, and those that a grammar forces
    logprobs: list[Logprobs] | None = None  # one position for each of `tokens`
    input_logprobs: Logprobs | None = None  # of the scored prompt positions of this slice
    vector: bytes = b""  # embed requests, on their last slice: float32
    vector_ids: bytes = b""
    scalar: bool = False
    hidden_states: bytes = b""
    routed_experts: bytes = b""  # int32 (positions of the slice, layers, top_k)
    complete: bool = False  # the request's grammar allows nothing after `tokens`
    error: str = ""  # this request cannot go on (for example NaN logits)
    error_kind: Kind = Kind.INTERNAL


@dataclass(slots=True)
class Update:
    """What is sent for one request: new output, its end, or both."""

    sequence: Sequence
    first: bool  # nothing was sent for this request before
    ids: bytes = b""
    logprobs: Logprobs | None = None
    input_logprobs: Logprobs | None = None
    vector: bytes = b""
    vector_ids: bytes = b""
    scalar: bool = False
    hidden_states: bytes = b""
    routed_experts: bytes = b""  # with finish
    drafts: Drafts | None = None  # of a decode step, where the server speculates
    finish: Finish | None = None
