"""One request inside the scheduler: its tokens, its pages, how far it is computed. Pure state, no decisions."""

from array import array
from dataclasses import dataclass, field

from runtime.messages import Finish, Request


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
    input_scored: int = 0  # prompt positions whose logprobs have been returned by the worker

    @property
    def rid(self) -> str:
        return self.request.rid

    @property
    def output_len(self) -> int:
        return len(self.ids) - self.prompt_len
