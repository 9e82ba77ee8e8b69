"""Which KV pages are free. Knows page numbers only: not tokens, not requests, not memory.

Free pages are kept as runs (as many neighbours as there are), found by size class. A caller may ask for a *reserve*:
the pages behind its last one are then left for its growth, so that a sequence tends to be one ascending run and
attention can read it as a view. Reserved pages still count as free, and are taken by others when no page else is.
"""

from collections.abc import Iterator, Sequence
from itertools import chain

NULL_PAGE = 0  # never handed out: padding rows write there
SIZE_CLASSES = 40
MAX_PROBES = 8  # runs of the exact size class that are tried before a larger class is used


def runs_of(pages: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(first, count) of each ascending run of neighbours, in order."""
    if not pages:
        return
    first = pages[0]
    if pages[-1] - first == len(pages) - 1 and list(pages) == list(range(first, first + len(pages))):
        yield first, len(pages)
        return
    end = first
    for page in pages:
        if page != end:
            yield first, end - first
            first = page
        end = page + 1
    yield first, end - first


class PageAllocator:
    """Pages 1..total; `free` of them can be taken."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.free = 0
        self._length: dict[int, int] = {}  # first page of a free run → its length
        self._first: dict[int, int] = {}  # page behind a free run → its first page
        self._classes: list[dict[int, None]] = [{} for _ in range(SIZE_CLASSES)]  # first pages by length.bit_length()
        self._reserves: dict[int, int] = {}  # first page of a reserve → its length
        self._put(NULL_PAGE + 1, total)
        self.free = total

    def take(self, count: int, reserve: int = 0, after: int = NULL_PAGE) -> list[int]:
        """`count` pages in as few runs as possible, behind `after` if that run is long enough; at most `free`."""
        assert 0 <= count <= self.free, (count, self.free)
        self.free -= count
        pages: list[int] = []
        if after and self._length.get(after + 1, 0) >= max(count, 1):
            pages += self._cut(after + 1, count, reserve)
        while len(pages) < count:
            missing = count - len(pages)
            first = self._find(missing + reserve)
            pages += self._cut(first, min(missing, self._length[first]), reserve)
        return pages

    def grow(self, pages: list[int], reserve: int = 0) -> None:
        """Append one page to a sequence's list, which is not empty: the neighbour of its last page if that is free."""
        assert self.free > 0, self.free
        page = pages[-1] + 1
        left = self._reserves.pop(page, 0)
        if left:
            if left > 1:
                self._reserves[page + 1] = left - 1
        elif page in self._length:
            self._cut(page, 1, reserve)
        else:
            page = self._cut(self._find(1 + reserve), 1, reserve)[0]
        self.free -= 1
        pages.append(page)

    def give(self, pages: Sequence[int]) -> None:
        """Take pages back."""
        for first, count in runs_of(pages):
            self._put(first, count)
        self.free += len(pages)

    def drop_reserve(self, last: int) -> None:
        """Free the reserve of the sequence whose last page is `last`."""
        length = self._reserves.pop(last + 1, 0)
        if length:
            self._put(last + 1, length)

    def free_pages(self) -> set[int]:
        """Every free page, one by one (for checks)."""
        runs = (range(first, first + n) for first, n in chain(self._length.items(), self._reserves.items()))
        return set(chain.from_iterable(runs))

    def check_invariants(self) -> None:
        """Assert that runs and reserves are disjoint, in bounds and add up to `free`, and that no runs touch."""
        pages = self.free_pages()
        lengths = sum(self._length.values()) + sum(self._reserves.values())
        assert len(pages) == lengths == self.free, (len(pages), lengths, self.free)
        assert not pages or (min(pages) > NULL_PAGE and max(pages) <= self.total), (min(pages), max(pages))
        for first, length in self._length.items():
            assert self._first[first + length] == first and first + length not in self._length, (first, length)
            assert first in self._classes[length.bit_length()], (first, length)
        assert sum(map(len, self._classes)) == len(self._first) == len(self._length)

    def _find(self, length: int) -> int:
        """First page of a small run of at least `length` pages, else of a longest one."""
        exact = length.bit_length()
        for first, _ in zip(self._classes[exact], range(MAX_PROBES)):  # noqa: B905 (a bounded probe)
            if self._length[first] >= length:
                return first
        for size in chain(range(exact + 1, SIZE_CLASSES), range(exact, 0, -1)):
            if self._classes[size]:
                return next(iter(self._classes[size]))
        self._shrink_largest_reserve()
        return self._find(length)

    def _shrink_largest_reserve(self) -> None:
        """Free the far half of the largest reserve (all of it when it is one page)."""
        first = max(self._reserves, key=self._reserves.__getitem__)
        length = self._reserves.pop(first)
        if kept := length // 2:
            self._reserves[first] = kept
        self._put(first + kept, length - kept)

    def _cut(self, first: int, count: int, reserve: int) -> range:
        """Take the head of a run, reserve up to `reserve` pages behind it, put back the rest."""
        length = self._remove(first)
        kept = min(reserve, length - count)
        if kept:
            self._reserves[first + count] = kept
        if rest := length - count - kept:
            self._insert(first + count + kept, rest)
        return range(first, first + count)

    def _put(self, first: int, length: int) -> None:
        """Add a free run, merged with its neighbours."""
        if not length:
            return
        if (before := self._first.get(first)) is not None:
            length += self._remove(before)
            first = before
        if first + length in self._length:
            length += self._remove(first + length)
        self._insert(first, length)

    def _insert(self, first: int, length: int) -> None:
        self._length[first] = length
        self._first[first + length] = first
        self._classes[length.bit_length()][first] = None

    def _remove(self, first: int) -> int:
        length = self._length.pop(first)
        del self._first[first + length]
        del self._classes[length.bit_length()][first]
        return length
