"""From a plan to what the model and the sampler read: flat arrays over all tokens of the step."""

from array import array
from bisect import bisect_left
from dataclasses import dataclass, field

import torch

from quartet.kernels.cpu.attention_schedule import Ragged, Run, segments
from quartet.kernels.cpu.native.page_table import Wanted
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.kv_cache import Placement
from quartet.scheduler_service.host.transfer import send
from quartet.scheduler_service.model.state_access import StateRows

FEWEST_LEFT_OUT = 16  # tokens; a step with fewer that nobody looks at computes all
TYPES = {"i": torch.int32, "q": torch.int64}


@dataclass(slots=True)
class Inputs:
    """One step's tokens, sequences side by side."""

    input_ids: torch.Tensor  # (tokens,) int64
    positions: torch.Tensor  # (tokens,) int64
    starts: torch.Tensor  # (slices + 1,) int64
    offsets: list[int]  # the same as Python ints
    ragged: Ragged
    placement: Placement
    token_types: torch.Tensor | None = None  # (tokens,) int64
    attended: list[int] | None = None  # by slice
    embeds: torch.Tensor | None = None  # (tokens, hidden)
    embeds_mask: torch.Tensor | None = None  # (tokens,) bool
    states: StateRows | None = None  # of a model with recurrent layers
    wanted: Wanted | None = None  # None: all tokens


class PageRuns:
    """A sequence's pages as runs of consecutive pages, extended as its list of pages grows.

    While a sequence is admitted its list only grows; a new admission brings a new list.
    """

    def __init__(self) -> None:
        self.pages: list[int] = []
        self.seen = 0  # pages of the list that are in `runs`
        self.runs: list[Run] = []

    def of(self, sequence: Sequence) -> list[Run]:
        if self.pages is not sequence.pages:
            self.pages, self.seen, self.runs = sequence.pages, 0, []
        for page in self.pages[self.seen :]:
            append_page(self.runs, page)
        self.seen = len(self.pages)
        return self.runs


def append_page(runs: list[Run], page: int) -> None:
    if runs and sum(runs[-1]) == page:
        runs[-1] = (runs[-1][0], runs[-1][1] + 1)
    else:
        runs.append((page, 1))


@dataclass(slots=True)
class _Columns:
    """The arrays of a step while they grow slice by slice."""

    page_size: int
    ids: "array[int]" = field(default_factory=lambda: array("i"))
    positions: "array[int]" = field(default_factory=lambda: array("q"))
    slots: "array[int]" = field(default_factory=lambda: array("q"))
    begun: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=lambda: [0])

    def add_row(self, share: Slice, token: int) -> None:
        """A decode row."""
        page_number, offset = divmod(share.start, self.page_size)
        page = share.sequence.pages[page_number]
        if not offset and self.page_size > 1:
            self.begun.append(page)
        self.ids.append(token)
        self.positions.append(share.start)
        self.slots.append(page * self.page_size + offset)
        self.offsets.append(len(self.ids))

    def add_chunk(self, share: Slice, runs: list[Run]) -> None:
        """Several tokens of one sequence."""
        sequence = share.sequence
        page_number, filled = divmod(share.end, self.page_size)
        if filled and page_number * self.page_size >= share.start:
            self.begun.append(sequence.pages[page_number])
        self.ids.extend(sequence.ids[share.start : share.end])
        self.ids.extend(share.drafts)
        self.positions.extend(range(share.start, share.end))
        for slot, length in segments(runs, self.page_size, share.start, share.end):
            self.slots.extend(range(slot, slot + length))
        self.offsets.append(len(self.ids))


def make_inputs(plan: Plan, runs: list[list[Run]], last_tokens: list[int], page_size: int) -> Inputs:
    """Lay a plan's tokens side by side.

    By slice: `runs` are its sequence's pages, `last_tokens` stand in for ids that are not committed yet.
    """
    columns = _Columns(page_size)
    for share, its_runs, last_token in zip(plan.slices, runs, last_tokens, strict=True):
        ids = share.sequence.ids
        if share.end - share.start == 1:
            columns.add_row(share, ids[share.start] if share.start < len(ids) else last_token)
        else:
            columns.add_chunk(share, its_runs)
    ragged = Ragged(
        [share.end - share.start for share in plan.slices], [share.end for share in plan.slices], runs, page_size
    )
    return Inputs(
        input_ids=tensor(columns.ids),
        positions=tensor(columns.positions),
        starts=torch.tensor(columns.offsets),
        offsets=columns.offsets,
        ragged=ragged,
        placement=Placement(tensor(columns.slots), torch.tensor(columns.begun) if columns.begun else None),
    )


def tensor(numbers: "array[int]") -> torch.Tensor:
    """An array('i') or array('q') as int64."""
    return torch.frombuffer(numbers, dtype=TYPES[numbers.typecode]).long()


def add_embeds(inputs: Inputs, plan: Plan, hidden_size: int) -> None:
    """Attach the prompt embeddings that requests brought with them instead of ids."""
    asked = [
        (share, row)
        for share, row in zip(plan.slices, inputs.offsets, strict=False)
        if share.sequence.embeds and share.start < share.sequence.prompt_len
    ]
    if not asked:
        return
    inputs.embeds = torch.zeros(len(inputs.input_ids), hidden_size)  # (tokens, hidden)
    inputs.embeds_mask = torch.zeros(len(inputs.input_ids), dtype=torch.bool)
    for share, row in asked:
        own = torch.frombuffer(bytearray(share.sequence.embeds), dtype=torch.float32).view(-1, hidden_size)
        part = own[share.start : share.end]  # (prompt tokens of this slice, hidden)
        inputs.embeds[row : row + len(part)] = part
        inputs.embeds_mask[row : row + len(part)] = True


def add_token_types(inputs: Inputs, plan: Plan) -> None:
    """Attach the segment ids of cross-encoders."""
    if not any(share.sequence.token_types for share in plan.slices):
        return
    inputs.token_types = torch.zeros_like(inputs.input_ids)
    for share, row in zip(plan.slices, inputs.offsets, strict=False):
        types = array("i", share.sequence.token_types)[share.start : share.end]
        inputs.token_types[row : row + len(types)] = torch.tensor(types)


def add_attended(inputs: Inputs, plan: Plan) -> None:
    """Attach how many tokens of each text are seen, where that is not all of them."""
    if any(share.sequence.attended for share in plan.slices):
        inputs.attended = [share.sequence.attended or share.end - share.start for share in plan.slices]


def add_wanted(inputs: Inputs, plan: Plan, rows: list[int]) -> None:
    """Attach the rows that logits are made of, the last ones of each slice, where nobody looks at many others."""
    if len(inputs.input_ids) - len(rows) < FEWEST_LEFT_OUT or any(map(looks_at_all, plan.slices)):
        return
    starts = [bisect_left(rows, offset) for offset in inputs.offsets]
    inputs.wanted = Wanted(torch.tensor(rows, dtype=torch.int64), torch.tensor(starts))


def looks_at_all(share: Slice) -> bool:
    """Whether the hidden state of every token of a slice is needed."""
    request = share.sequence.request
    return share.score_from >= 0 or request.return_hidden_states or request.task != "generate"


def to_device(inputs: Inputs, device: torch.device) -> None:
    """Move all tensors of a step."""
    if device.type == "cpu":
        return
    inputs.input_ids, inputs.positions, inputs.starts = (
        send(x, device) for x in (inputs.input_ids, inputs.positions, inputs.starts)
    )
    placement = inputs.placement
    placement.slots = send(placement.slots, device)
    placement.begun = None if placement.begun is None else send(placement.begun, device)
    inputs.token_types, inputs.embeds, inputs.embeds_mask = (
        None if x is None else send(x, device) for x in (inputs.token_types, inputs.embeds, inputs.embeds_mask)
    )
