"""The sequences of a step as the attention kernel reads them."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Groups:
    """All sequences of a step, those together that begin with the same keys."""

    members: torch.Tensor  # (sequences,) int64: group by group
    sharing: torch.Tensor  # (groups, 2) int64: how many sequences; how many keys, of one query each if there are any


@dataclass(frozen=True, slots=True)
class Wanted:
    """The tokens of a step whose hidden states somebody looks at: of each sequence, its last ones."""

    rows: torch.Tensor  # (wanted,) int64, ascending
    starts: torch.Tensor  # (sequences + 1,) int64: where those of a sequence begin among them


@dataclass(frozen=True, slots=True)
class PageTable:
    """Sequences, their queries and their pages."""

    starts: torch.Tensor  # (sequences + 1,) int64: where a sequence's queries begin among the tokens
    lengths: torch.Tensor  # (sequences,) int64: its context, which ends with the queries
    pages: torch.Tensor  # int32, of all sequences
    page_starts: torch.Tensor  # (sequences,) int64: where a sequence's begin
    page_size: int
    most_tokens: int  # of the pool: one more than the last token that the pages have
    groups: Groups | None = None  # None: all sequences begin differently

    def arguments(self) -> Iterator[int | None]:
        """The fields of `struct attention` and `struct step` from `page_size` to `sharing` (api.h)."""
        yield self.page_size
        yield len(self.lengths)
        for tensor in (self.starts, self.lengths, self.pages, self.page_starts):
            yield tensor.data_ptr()
        yield 0 if self.groups is None else len(self.groups.sharing)
        yield None if self.groups is None else self.groups.members.data_ptr()
        yield None if self.groups is None else self.groups.sharing.data_ptr()
