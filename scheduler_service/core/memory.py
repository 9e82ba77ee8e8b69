"""The KV pool's books: the page allocator and the prefix tree together. Who holds which page, and when it comes back.

Every page is in exactly one of three places: free (allocator), cached (tree), or held by one admitted sequence. A
sequence's `pages` may also name cached ones: those of the path that it pins. A held page becomes cached when the tree
has nothing for that prefix yet; a sequence that computed the same prefix at the same time keeps its own copy until it
leaves, because its page list only ever grows while it is admitted.
"""

from collections.abc import Iterable
from enum import Enum, auto

from quartet.scheduler_service.core.pages import PageAllocator
from quartet.scheduler_service.core.prefix_tree import Node, PrefixTree
from quartet.scheduler_service.core.request import Sequence

ROOM_TOKENS = 1024  # neighbouring pages kept for a new sequence's growth, at most
REGROWTH_TOKENS = 128  # the same for one that had to go on elsewhere
WAIT_TOKENS = 32  # a shared prefix of this length is worth waiting for


class Verdict(Enum):
    """What came of an attempt to admit a sequence."""

    ADMITTED = auto()
    NO_ROOM = auto()
    AWAITS_PREFIX = auto()  # another sequence is computing the pages that this one would compute next


class Memory:
    """Gives pages to sequences and takes them back."""

    def __init__(self, page_size: int, total_pages: int, reuse_prefixes: bool) -> None:
        self.page_size = page_size
        self.pages = PageAllocator(total_pages)
        self.tree = PrefixTree(page_size)
        self.reuse_prefixes = reuse_prefixes
        self._coming: dict[object, Sequence] = {}  # (node, next tokens) → who is computing them

    @property
    def available(self) -> int:
        """Pages that a taker can have, evicting what must be evicted."""
        return self.pages.free + self.tree.evictable

    @property
    def used(self) -> int:
        """Pages that live requests hold or pin."""
        return self.pages.total - self.available

    @property
    def usage(self) -> float:
        return self.used / self.pages.total

    def pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_size)

    def cached_prefix(self, sequence: Sequence) -> int:
        """Tokens of the sequence that the tree holds now; changes nothing."""
        return self.tree.matched_pages(sequence.namespace.encode(), sequence.ids.tobytes()) * self.page_size

    def admit(self, sequence: Sequence, reusable: int, spare: int) -> Verdict:
        """Pin the cached prefix of at most `reusable` tokens and take pages for all the rest of `ids`.

        Refuses when fewer than `spare` pages would be left. `sequence.computed` is the cached length afterwards.
        """
        node, prefix = self._pin_prefix(sequence, reusable)
        if node and self._next_key(node, sequence, len(prefix), reusable) in self._coming:
            self.tree.unpin(node)
            return Verdict.AWAITS_PREFIX
        need = self.pages_for(len(sequence.ids)) - len(prefix)
        if need + spare > self.available:
            if node:
                self.tree.unpin(node)
            return Verdict.NO_ROOM
        self._ensure(need)
        room = min(sequence.limit, ROOM_TOKENS) // self.page_size
        sequence.pages = prefix + self.pages.take(need, room, after=prefix[-1] if prefix else 0)
        sequence.tree_node = node
        sequence.kept_pages = len(prefix)
        sequence.computed = len(prefix) * self.page_size
        self._announce(sequence, len(sequence.ids))
        return Verdict.ADMITTED

    def missing(self, sequence: Sequence, reusable: int) -> int | None:
        """Pages that `admit` would lack (below zero: that it would leave); None where it would await a prefix."""
        node, prefix = self._pin_prefix(sequence, reusable)
        awaits = node is not None and self._next_key(node, sequence, len(prefix), reusable) in self._coming
        missing = self.pages_for(len(sequence.ids)) - len(prefix) - self.available
        if node:
            self.tree.unpin(node)
        return None if awaits else missing

    def grow(self, sequences: list[Sequence]) -> None:
        """One more page for each, each time it is named."""
        self._ensure(len(sequences))
        room = REGROWTH_TOKENS // self.page_size
        for sequence in sequences:
            self.pages.grow(sequence.pages, room)

    def reach(self, sequence: Sequence, end: int, spare: int) -> int:
        """Have pages for the first `end` positions, if that leaves `spare` pages, or for as many as it does.

        Returns how many of the positions have one.
        """
        missing = self.pages_for(end) - len(sequence.pages)
        self.grow([sequence] * min(missing, self.available - spare))
        return min(end, len(sequence.pages) * self.page_size)

    def keep(self, sequence: Sequence, computed: int) -> None:
        """Offer the full pages among the first `computed` positions to the tree; others may use them from now on."""
        node = sequence.tree_node
        count = computed // self.page_size
        if not isinstance(node, Node) or count <= sequence.kept_pages:
            return
        tokens = sequence.ids[: count * self.page_size].tobytes()
        deeper = self.tree.insert(sequence.namespace.encode(), tokens, sequence.pages[:count])
        self.tree.pin(deeper)
        self.tree.unpin(node)
        sequence.tree_node = deeper
        sequence.kept_pages = count
        self._announce(sequence, sequence.prefill_end)

    def release(self, sequence: Sequence, computed: int) -> None:
        """Take everything back; the KV of the first `computed` positions is worth keeping."""
        self.keep(sequence, computed)
        self._withdraw(sequence)
        self.pages.drop_room(sequence.pages[-1])
        self.pages.give(self.own_pages(sequence))
        if isinstance(sequence.tree_node, Node):
            self.tree.unpin(sequence.tree_node)
        sequence.pages, sequence.tree_node, sequence.kept_pages = [], None, 0

    def own_pages(self, sequence: Sequence) -> list[int]:
        """The pages of an admitted sequence that are held by it and not by the tree."""
        if not isinstance(sequence.tree_node, Node):
            return sequence.pages
        cached = self.tree.path_pages(sequence.tree_node)
        count = len(cached)
        if cached == sequence.pages[:count]:
            return sequence.pages[count:]
        copies = [mine for mine, theirs in zip(sequence.pages, cached, strict=False) if mine != theirs]
        return copies + sequence.pages[count:]

    def clear(self) -> None:
        """Forget every cached prefix that nobody pins."""
        self.pages.give(self.tree.clear())

    def check(self, admitted: Iterable[Sequence]) -> None:
        """Assert that free, cached and held pages are disjoint and together all there are."""
        self.pages.check()
        free, cached = self.pages.free_pages(), self.tree.check()
        held = [page for sequence in admitted for page in self.own_pages(sequence)]
        counts = (len(free), len(held), len(cached), self.pages.total)
        assert sum(counts[:3]) == self.pages.total, counts
        assert len(free | cached | set(held)) == self.pages.total, counts

    def _pin_prefix(self, sequence: Sequence, reusable: int) -> tuple[Node | None, list[int]]:
        """The pinned node at the end of the usable cached prefix, and its pages; (None, []) outside of the tree."""
        if not self.reuse_prefixes or sequence.embeds:
            return None, []
        usable = reusable - reusable % self.page_size
        node = self.tree.match(sequence.namespace.encode(), sequence.ids[:usable].tobytes())
        self.tree.pin(node)
        return node, self.tree.path_pages(node)

    def _next_key(self, node: Node, sequence: Sequence, prefix_pages: int, reusable: int) -> object:
        """What identifies the pages that `sequence` computes next; None when they are not worth waiting for."""
        start = prefix_pages * self.page_size
        end = start + max(WAIT_TOKENS, self.page_size)
        if end > reusable:
            return None
        namespace = "" if prefix_pages else sequence.namespace
        return node, namespace, sequence.ids[start:end].tobytes()

    def _announce(self, sequence: Sequence, prefill_end: int) -> None:
        """Tell others which prefix comes next from this sequence, while it is being prefilled."""
        self._withdraw(sequence)
        if isinstance(sequence.tree_node, Node):
            key = self._next_key(sequence.tree_node, sequence, sequence.kept_pages, prefill_end)
            if key is not None and key not in self._coming:
                self._coming[key] = sequence
                sequence.awaited = key

    def _withdraw(self, sequence: Sequence) -> None:
        if sequence.awaited is not None:
            del self._coming[sequence.awaited]
            sequence.awaited = None

    def _ensure(self, count: int) -> None:
        """Have `count` pages free."""
        if count > self.pages.free:
            self.pages.give(self.tree.evict(count - self.pages.free))
