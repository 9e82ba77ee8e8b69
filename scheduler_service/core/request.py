"""One request inside the scheduler: its tokens, its pages, how far it is computed. State only, no decisions."""

from array import array
from dataclasses import dataclass, field

from quartet.runtime.messages import Finish, Logprobs, Request, Timeline
from quartet.scheduler_service.core.block_keys import BlockKeys
from quartet.scheduler_service.core.drafts import Drafter, Grammar
from quartet.scheduler_service.core.thought_budget import UNLIMITED, ThoughtBudget


@dataclass(slots=True)
class PositionData:
    """Bytes per position, each position once: a retracted request computes its positions again."""

    parts: list[bytes] = field(default_factory=list)
    end: int = 0  # first position without data

    def add(self, start: int, end: int, data: bytes) -> None:
        """Store the data of positions [start, end), equally long for each, except of positions already stored."""
        width = len(data) // (end - start)
        self.parts.append(data[max(0, self.end - start) * width :])
        self.end = max(self.end, end)

    def take(self) -> bytes:
        """Everything since the last take."""
        data = b"".join(self.parts)
        self.parts.clear()
        return data


@dataclass(slots=True, eq=False)
class Sequence:
    """A request from its arrival in the scheduler until it has left.

    Positions: `ids[:prompt_len]` is the prompt, the rest was sampled. The KV of positions `[0, computed)` lies in
    `pages`, counting what launched steps will have written. With overlapped scheduling `computed` may run ahead
    of `len(ids)`: the token at that position is still on the device.
    """

    request: Request
    ids: "array[int]"
    prompt_len: int
    arrived_at: float = 0.0  # scheduler's clock
    token_types: bytes = b""
    attended: int = 0  # prompt tokens that others see; 0: all
    embeds: bytes = b""
    namespace: str = ""  # of the prefix cache: generation of the KV, version of the adapter, extra key
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0  # launched plans that name this sequence
    cached_tokens: int = 0  # prompt tokens found in the prefix tree at the first admission
    retractions: int = 0
    finish: Finish | None = None
    update_sent: bool = False  # its first Update was made
    slot: int = -1  # row of the worker's per-request state, while admitted
    tree_node: object | None = None  # deepest pinned node of the prefix tree, while admitted
    input_scored: int = 0  # the requested prompt logprobs up to this position have been returned by the worker
    # only the core uses these
    serial: int = 0  # order of arrival
    priority: int = 0  # greater ones come first
    started: bool = False  # it was admitted once
    overtaken: int = 0  # by requests with other adapters, while it waited for its own
    queue_s: float = 0.0  # how long it had waited then
    times: Timeline | None = None  # of a request that is traced
    timed_from_s: float = 0.0  # when it arrived, or was first admitted, by the clock of `Deadlines`
    limit: int = 0  # output tokens at most, already clipped to context and pool
    stop_ids: frozenset[int] = frozenset()
    prefill_end: int = 0  # the positions to prefill at this admission
    cached_pages: int = 0  # leading pages that were put into the prefix tree or found there, at this admission
    branch: int = 0  # positions that the prefix tree held at this admission; more than `computed` without a snapshot
    restores: int = -1  # the snapshot of recurrent state that the next slice begins with
    block_keys: BlockKeys | None = None  # of its blocks in the tier behind the KV pool
    announced: object | None = None  # key under which others wait for the prefix that is being computed here
    kv_invalid: bool = False  # its computation failed: its KV must not be cached
    retracting: bool = False  # goes back to the queue once no plan in flight names it
    scored: list[Logprobs] = field(default_factory=list)  # prompt logprobs not yet sent
    hidden: PositionData = field(default_factory=PositionData)  # hidden states not yet sent
    routed: PositionData = field(default_factory=PositionData)  # chosen experts, sent at the end
    grammar: Grammar | None = None  # what constrains the output; the worker knows more of it
    drafter: Drafter | None = None  # for speculative decoding
    thought_budget: ThoughtBudget | None = None  # of the committed tokens; followed where there is a drafter

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def output_len(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def most_drafts(self) -> int:
        """How many tokens a draft may have, so that no verified position may need a token that is forced."""
        if self.thought_budget is None:
            return UNLIMITED
        self.thought_budget.follow(self.ids)
        return max(0, self.thought_budget.free - 1)

    @property
    def needs_decode(self) -> bool:
        """Whether one more decode row may be planned, counting the tokens that are still in flight."""
        return (
            self.prefill_end <= self.computed < self.prompt_len + self.limit - 1
            and self.finish is None
            and not self.retracting
        )

    @property
    def needs_prefill(self) -> bool:
        return self.computed < self.prefill_end and self.finish is None and not self.retracting
