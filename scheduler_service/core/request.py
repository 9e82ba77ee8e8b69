"""One request inside the scheduler: its tokens, its pages, how far it is computed. Pure state, no decisions."""

from array import array
from dataclasses import dataclass, field

from quartet.runtime.messages import Finish, Logprobs, Request
from quartet.scheduler_service.core.drafts import Drafter


@dataclass(slots=True)
class Rows:
    """What the worker returns for every position, once: a retracted request computes its positions again."""

    parts: list[bytes] = field(default_factory=list)
    end: int = 0  # positions whose rows have come

    def add(self, start: int, end: int, data: bytes) -> None:
        """Take the equal rows of positions [start, end), but for those that came before."""
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
    """A request from its arrival in the scheduler to its retirement.

    Positions: `ids[:prompt_len]` is the prompt, the rest was sampled. The KV of positions `[0, computed)` lies in
    `pages`, counting what launched steps will have written. With overlapped scheduling `computed` may run ahead
    of `len(ids)`: the token at that position is still on the device.
    """

    request: Request
    ids: "array[int]"
    prompt_len: int
    arrived_at: float = 0.0  # scheduler's clock
    token_types: bytes = b""
    embeds: bytes = b""
    namespace: str = ""  # prefix-cache namespace: weight version, LoRA, extra key
    pages: list[int] = field(default_factory=list)
    computed: int = 0
    in_flight: int = 0  # launched plans that name this sequence
    cached_tokens: int = 0  # prompt tokens found in the prefix tree at first admission
    retractions: int = 0
    finish: Finish | None = None
    opened: bool = False  # its first Tokens message has left
    slot: int = -1  # row of the worker's per-request state, while admitted
    tree_node: object | None = None  # deepest pinned node of the prefix tree, while admitted
    input_scored: int = 0  # wanted prompt positions up to this one have had their logprobs returned by the worker
    # the planner's own
    serial: int = 0  # order of arrival
    priority: int = 0  # greater ones come first
    started: bool = False  # it was admitted once
    since_s: float = 0.0  # when that was, or when it came, by the clock of `Deadlines`
    limit: int = 0  # output tokens at most, already clipped to context and pool
    stop_ids: frozenset[int] = frozenset()
    prefill_end: int = 0  # the positions to prefill at this admission
    kept_pages: int = 0  # leading pages that the prefix tree has been offered at this admission
    awaited: object | None = None  # key under which others wait for the prefix that is being computed here
    poisoned: bool = False  # its KV is not worth keeping
    leaving: bool = False  # retracted: goes back to the queue once nothing is in flight
    scored: list[Logprobs] = field(default_factory=list)  # prompt logprobs not yet sent
    hidden: Rows = field(default_factory=Rows)  # hidden states not yet sent
    routed: Rows = field(default_factory=Rows)  # chosen experts, sent at the end
    grammar: object | None = None  # the worker's: what constrains the output
    drafter: Drafter | None = None  # where its tokens are drafted

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def output_len(self) -> int:
        return len(self.ids) - self.prompt_len

    @property
    def wants_decode(self) -> bool:
        """Whether one more decode row may be planned, counting the tokens that are still in flight."""
        return (
            self.prefill_end <= self.computed < self.prompt_len + self.limit - 1
            and self.finish is None
            and not self.leaving
        )

    @property
    def wants_prefill(self) -> bool:
        return self.computed < self.prefill_end and self.finish is None and not self.leaving
