"""What a step's paged attention does, decided once from lengths and pages, and reused by every layer.

Decode rows and prefill chunks become calls: which rows attend to which keys, on a view or gathered, under which mask.
The calls of a row see disjoint keys; their results are merged by log-sum-exp.
"""

from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from math import inf

import torch

from quartet.kernels.cpu.native.page_table import PageTable

Run = tuple[int, int]  # (first page, number of consecutive pages)
Segment = tuple[int, int]  # (first token slot, number of consecutive tokens)

BATCH_BYTES = 256 << 10  # decode rows with less KV than this share a padded call (Ragged.batch_bytes)
SHARE_ROWS = 4  # fewer rows do not repay the merge
SHARE_TOKENS = 128
MAX_VIEWS = 4  # a row scattered over more segments is gathered
BLOCK_QUERIES = 128  # rows of an explicit score matrix


@dataclass(slots=True)
class Ragged:
    """One step's sequences, side by side: the last `query_lengths[i]` of `context_lengths[i]` positions are queries."""

    query_lengths: list[int]
    context_lengths: list[int]
    runs: list[list[Run]]  # the pages of each sequence
    page_size: int
    batch_bytes: int = BATCH_BYTES
    schedules: dict[tuple[object, ...], "Schedule"] = field(default_factory=dict)
    table: PageTable | None = None  # the same for our own kernel
    chunked: dict[int, "Ragged"] = field(default_factory=dict)  # by the size of chunks

    def by_chunk(self, size: int) -> "Ragged":
        """The same queries where each sees its own chunk of so many positions, as if chunks were sequences.

        A chunk is whole pages.
        """
        if size not in self.chunked:
            assert size % self.page_size == 0, (size, self.page_size)
            queries, contexts, runs = list[int](), list[int](), list[list[Run]]()
            for count, length, its_runs in zip(self.query_lengths, self.context_lengths, self.runs, strict=True):
                first = length - count
                while first < length:
                    begin = first // size * size
                    end = min(begin + size, length)
                    queries.append(end - first)
                    contexts.append(end - begin)
                    runs.append(runs_between(its_runs, begin // self.page_size, -(-end // self.page_size)))
                    first = end
            self.chunked[size] = Ragged(queries, contexts, runs, self.page_size, self.batch_bytes)
        return self.chunked[size]


def runs_between(runs: list[Run], first: int, last: int) -> list[Run]:
    """The pages number [first, last) of a sequence."""
    found, seen = list[Run](), 0
    for page, count in runs:
        begin, end = max(first - seen, 0), min(last - seen, count)
        if begin < end:
            found.append((page + begin, end - begin))
        seen += count
    return found


@dataclass(slots=True)
class DecodeCall:
    """Some decode rows against some keys; the result is partial number `part` of those rows."""

    rows: torch.Tensor | slice
    part: int = 0
    view: Segment | None = None  # keys of all the rows, on a view
    pages: torch.Tensor | None = None  # or pages to gather: (rows * pages of a row,)
    mask: torch.Tensor | None = None  # (1, rows, 1, gathered tokens), with `pages`


@dataclass(slots=True)
class Block:
    """Queries [first, last) of a chunk against its keys [low, high)."""

    first: int
    last: int
    low: int
    high: int
    causal: bool = False
    mask: torch.Tensor | None = None  # (queries, keys)


@dataclass(slots=True)
class ChunkCall:
    """A prefill chunk: token rows, where its keys are, and the blocks whose results are merged per query."""

    rows: slice
    view: Segment | None
    pages: torch.Tensor | None
    blocks: list[Block]


@dataclass(slots=True)
class Schedule:
    """All calls of a step."""

    decode_rows: torch.Tensor | slice | None = None  # token rows of the decode rows
    parts: int = 1
    decode: list[DecodeCall] = field(default_factory=list)  # rows count among the decode rows
    chunks: list[ChunkCall] = field(default_factory=list)
    scratch: list[torch.Tensor] = field(default_factory=list)  # for gathered keys and values, kept from layer to layer


def schedule(
    ragged: Ragged, q: torch.Tensor, k_pool: torch.Tensor, window: int | None, softcap: float | None, causal: bool
) -> Schedule:
    """The calls that cover a step's attention; made once for all layers of the same shape."""
    if window is not None and window >= max(ragged.context_lengths):
        window = None
    token_bytes = 2 * k_pool.shape[0] * k_pool.shape[2] * k_pool.element_size()
    key = (window, softcap is None, causal, token_bytes, q.dtype)
    if key not in ragged.schedules:
        ragged.schedules[key] = _Scheduler(ragged, window, softcap is not None, causal, token_bytes, q).build()
    return ragged.schedules[key]


def segments(runs: list[Run], page_size: int, low: int, high: int) -> list[Segment]:
    """Where the KV of positions [low, high) lies, in order."""
    found: list[Segment] = []
    begin = 0
    for page, count in runs:
        end = begin + count * page_size
        first, last = max(low, begin), min(high, end)
        if first < last:
            found.append((page * page_size + first - begin, last - first))
        begin = end
    return found


def shared_pages(left: list[Run], right: list[Run]) -> int:
    """Number of leading pages that two sequences have in common."""
    common = 0
    for (left_page, left_count), (right_page, right_count) in zip(left, right, strict=False):
        if left_page != right_page:
            break
        common += min(left_count, right_count)
        if left_count != right_count:
            break
    return common


@dataclass(slots=True)
class _Scheduler:
    """Builds one Schedule."""

    ragged: Ragged
    window: int | None
    explicit: bool  # scores are materialised, so queries come in blocks
    causal: bool
    token_bytes: int
    like: torch.Tensor  # dtype and device of masks
    plan: Schedule = field(default_factory=Schedule)

    def build(self) -> Schedule:
        ragged, row = self.ragged, 0
        decode: list[tuple[int, int]] = []  # (sequence, token row)
        for sequence, length in enumerate(ragged.query_lengths):
            if length == 1:
                decode.append((sequence, row))
            elif length:
                self.plan.chunks.append(self.chunk(sequence, row))
            row += length
        if decode:
            self.plan.decode_rows = self.rows([row for _, row in decode])
            self.decode([sequence for sequence, _ in decode])
        return self.plan

    def rows(self, rows: list[int]) -> torch.Tensor | slice:
        """A slice where the rows are neighbours, else an index."""
        if all(b == a + 1 for a, b in pairwise(rows)):
            return slice(rows[0], rows[-1] + 1)
        return torch.tensor(rows, device=self.like.device)

    def decode(self, sequences: list[int]) -> None:
        lengths, runs = self.ragged.context_lengths, self.ragged.runs
        low = [0 if self.window is None else max(0, lengths[s] - self.window) for s in sequences]
        parts = [0] * len(sequences)
        if self.window is None:
            for members, pages in self.shared_groups(sequences):
                tokens = pages * self.ragged.page_size
                for part, view in enumerate(segments(runs[sequences[members[0]]], self.ragged.page_size, 0, tokens)):
                    self.plan.decode.append(DecodeCall(self.rows(members), part, view=view))
                    for member in members:
                        parts[member], low[member] = part + 1, tokens
        classes: dict[tuple[int, int], list[int]] = defaultdict(list)
        for row, sequence in enumerate(sequences):
            classes[self.batch_class(lengths[sequence] - low[row], parts[row])].append(row)
        for (size_class, part), members in classes.items():
            spans = [(runs[sequences[row]], low[row], lengths[sequences[row]]) for row in members]
            if size_class and len(members) > 1:
                self.padded_call(members, part, spans)
                self.plan.parts = max(self.plan.parts, part + 1)
            else:
                for row, span in zip(members, spans, strict=True):
                    self.plan.parts = max(self.plan.parts, self.single_calls(row, part, *span))

    def batch_class(self, tokens: int, part: int) -> tuple[int, int]:
        """Rows of one class (not 0) share a padded call: short, and of similar length."""
        small = tokens * self.token_bytes <= self.ragged.batch_bytes
        pages = -(-tokens // self.ragged.page_size)
        return ((pages - 1).bit_length() + 1 if small else 0), part

    def shared_groups(self, sequences: list[int]) -> Iterator[tuple[list[int], int]]:
        """(rows, full pages all of them begin with), where attending to those once pays."""
        runs, page_size = self.ragged.runs, self.ragged.page_size
        by_first: dict[int, list[int]] = defaultdict(list)
        for row, sequence in enumerate(sequences):
            by_first[runs[sequence][0][0]].append(row)
        for members in by_first.values():
            if len(members) < SHARE_ROWS:
                continue
            first = runs[sequences[members[0]]]
            pages = min(shared_pages(first, runs[sequences[row]]) for row in members)
            # The query's own position stays out, so that every row keeps a tail of at least one token.
            pages = min(pages, *((self.ragged.context_lengths[sequences[row]] - 1) // page_size for row in members))
            if pages * page_size >= SHARE_TOKENS:
                yield members, pages

    def single_calls(self, row: int, part: int, runs: list[Run], low: int, high: int) -> int:
        """One row on views, or gathered where it is scattered. Returns the parts the row has now."""
        found = segments(runs, self.ragged.page_size, low, high)
        if len(found) > MAX_VIEWS:
            self.padded_call([row], part, [(runs, low, high)])
            return part + 1
        for view in found:
            self.plan.decode.append(DecodeCall(slice(row, row + 1), part, view=view))
            part += 1
        return part

    def padded_call(self, rows: list[int], part: int, spans: list[tuple[list[Run], int, int]]) -> None:
        """Rows with KV at positions [low, high) of their pages, gathered and padded with the null page."""
        size = self.ragged.page_size
        tables = [page_list(runs, low // size, -(-high // size)) for runs, low, high in spans]
        width = max(map(len, tables))
        pages = torch.tensor([page for table in tables for page in table + [0] * (width - len(table))])
        bounds = torch.tensor([(low % size, low % size + high - low) for _, low, high in spans])  # (rows, 2)
        token = torch.arange(width * size)
        hidden = (token < bounds[:, :1]) | (token >= bounds[:, 1:])  # (rows, tokens)
        mask = self.bias(hidden).view(1, len(rows), 1, -1)
        self.plan.decode.append(DecodeCall(self.rows(rows), part, pages=pages.to(self.like.device), mask=mask))

    def bias(self, hidden: torch.Tensor) -> torch.Tensor:
        return torch.zeros(hidden.shape, dtype=self.like.dtype).masked_fill_(hidden, -inf).to(self.like.device)

    def chunk(self, sequence: int, row: int) -> ChunkCall:
        ragged = self.ragged
        queries, length = ragged.query_lengths[sequence], ragged.context_lengths[sequence]
        found = segments(ragged.runs[sequence], ragged.page_size, 0, length)
        pages = None
        if len(found) > 1:
            table = page_list(ragged.runs[sequence], 0, -(-length // ragged.page_size))
            pages = torch.tensor(table, device=self.like.device)
        blocks = list(self.blocks(queries, length))
        return ChunkCall(slice(row, row + queries), found[0] if pages is None else None, pages, blocks)

    def blocks(self, queries: int, length: int) -> Iterator[Block]:
        start = length - queries
        if self.explicit or self.window is not None:
            for first in range(0, queries, BLOCK_QUERIES):
                yield self.masked_block(first, min(first + BLOCK_QUERIES, queries), start, length)
        elif not self.causal:
            yield Block(0, queries, 0, length)
        else:
            if start:
                yield Block(0, queries, 0, start)
            yield Block(0, queries, start, length, causal=True)

    def masked_block(self, first: int, last: int, start: int, length: int) -> Block:
        if self.window is None and not self.causal:
            return Block(first, last, 0, length)
        behind = length if self.window is None else self.window  # a query sees keys nearer than that
        ahead = 1 if self.causal else behind
        low, high = max(0, start + first - behind + 1), min(length, start + last - 1 + ahead)
        query = torch.arange(start + first, start + last).unsqueeze(1)  # positions
        key = torch.arange(low, high)
        hidden = (key >= query + ahead) | (key <= query - behind)
        return Block(first, last, low, high, mask=self.bias(hidden))


def page_list(runs: list[Run], first: int, last: int) -> list[int]:
    """Pages number `first` to `last` of a sequence."""
    return [page + i for page, count in runs for i in range(count)][first:last]
