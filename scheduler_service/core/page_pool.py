"""The pages of the KV pool: who holds which, and when it comes back. The page allocator and the prefix tree together.

Every page is in exactly one of three places: free (allocator), cached (tree), or held by one admitted sequence. A
sequence's `pages` may also name cached ones: those of the path that it pins. A held page becomes cached when the tree
has nothing for that prefix yet; a sequence that computed the same prefix at the same time keeps its own copy until it
leaves, because its page list only ever grows while it is admitted.

Where a tier keeps KV beyond the pool (`kv_tier.py`), it hears of every cached page, and `restore` makes pages of what
comes back from there.

For a model with recurrent layers (`options`) a cached prefix ends at the deepest node that has a snapshot of the state.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum, auto

from quartet.scheduler_service.core.kv_tier import Fetch, KvTier
from quartet.scheduler_service.core.pages import PageAllocator
from quartet.scheduler_service.core.plan import Slice
from quartet.scheduler_service.core.prefix_tree import Node, PrefixTree
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.rules import PlannerConfig
from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT, SnapshotOptions, Snapshots, borders

RESERVE_TOKENS = 1024  # neighbouring pages reserved for a new sequence's growth, at most
REGROWTH_RESERVE_TOKENS = 128  # the same for one that had to go on elsewhere
MIN_AWAITED_TOKENS = 32  # a shorter shared prefix is not worth waiting for


class Admission(Enum):
    """The result of an attempt to admit a sequence."""

    ADMITTED = auto()
    NO_ROOM = auto()
    AWAITS_PREFIX = auto()  # another sequence computes the pages that this one would compute next, or they are fetched


@dataclass(frozen=True, slots=True)
class Restored:
    """Pages for KV that was fetched: the first one takes what lies `skipped` pages behind the beginning of it."""

    pages: list[int]
    skipped: int = 0
    snapshot: int = NO_SNAPSHOT  # takes the recurrent state behind all of it; none where there is no room


class PagePool:
    """Gives pages to sequences and takes them back."""

    def __init__(
        self,
        page_size: int,
        total_pages: int,
        reuse_prefixes: bool,
        options: SnapshotOptions | None = None,
        tier: KvTier | None = None,
    ) -> None:
        """`options`: of a model with recurrent layers. `tier`: keeps KV beyond the pool."""
        self.page_size = page_size
        self.pages = PageAllocator(total_pages)
        self.options = options
        self.snapshots = Snapshots(options.count if options else 0)
        self.tree = PrefixTree(page_size, self.snapshots)
        self.reuse_prefixes = reuse_prefixes
        self.tier = tier
        self._in_computation: dict[object, Sequence] = {}  # (node, next tokens) → the sequence that computes them

    @property
    def available(self) -> int:
        """Pages that can be taken, evicting cached ones where necessary."""
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
        matched = self.tree.matched_snapshot_pages if self.options else self.tree.matched_pages
        return matched(sequence.namespace.encode(), sequence.ids.tobytes()) * self.page_size

    def admit(self, sequence: Sequence, reusable: int, spare: int) -> Admission:
        """Pin the cached prefix of at most `reusable` tokens and take pages for all the rest of `ids`.

        Refuses when fewer than `spare` pages would be left. `sequence.computed` is the cached length afterwards.
        """
        node, prefix, branch = self._pin_prefix(sequence, reusable)
        if node and self._next_key(node, sequence, len(prefix), reusable) in self._in_computation:
            self.tree.unpin(node)
            return Admission.AWAITS_PREFIX
        need = self.pages_for(len(sequence.ids)) - len(prefix)
        if need + spare > self.available:
            if node:
                self.tree.unpin(node)
            return Admission.NO_ROOM
        if self.tier and node and self.tier.awaits(sequence, len(prefix), reusable // self.page_size):
            self.tree.unpin(node)
            return Admission.AWAITS_PREFIX
        self._make_free(need)
        reserve = min(sequence.limit, RESERVE_TOKENS) // self.page_size
        sequence.pages = prefix + self.pages.take(need, reserve, after=prefix[-1] if prefix else 0)
        sequence.tree_node = node
        sequence.cached_pages = len(prefix)
        sequence.computed = len(prefix) * self.page_size
        sequence.branch = branch
        if node and node.snapshot != NO_SNAPSHOT:
            self.snapshots.begin_reading(node.snapshot)
            sequence.restores = node.snapshot
        self._announce(sequence, len(sequence.ids))
        if self.tier and node:
            self.tier.note(sequence, len(prefix))
        return Admission.ADMITTED

    def missing(self, sequence: Sequence, reusable: int) -> int | None:
        """Pages that `admit` would lack; zero or less: that it would leave. None where it would await a prefix."""
        node, prefix, _ = self._pin_prefix(sequence, reusable)
        awaits = node is not None and self._next_key(node, sequence, len(prefix), reusable) in self._in_computation
        missing = self.pages_for(len(sequence.ids)) - len(prefix) - self.available
        if node:
            self.tree.unpin(node)
        return None if awaits else missing

    def grow(self, sequences: list[Sequence]) -> None:
        """One more page for each; for one that is listed several times, as many pages."""
        self._make_free(len(sequences))
        reserve = REGROWTH_RESERVE_TOKENS // self.page_size
        for sequence in sequences:
            self.pages.grow(sequence.pages, reserve)

    def extend(self, sequence: Sequence, end: int, spare: int) -> int:
        """Take pages for the first `end` positions, or as many as leave `spare` pages; returns how many have one."""
        missing = self.pages_for(end) - len(sequence.pages)
        self.grow([sequence] * min(missing, self.available - spare))
        return min(end, len(sequence.pages) * self.page_size)

    def cache(self, sequence: Sequence, computed: int) -> None:
        """Put the full pages among the first `computed` positions into the tree, where others can match them."""
        node = sequence.tree_node
        count = computed // self.page_size
        if not isinstance(node, Node) or count <= sequence.cached_pages:
            return
        tokens = sequence.ids[: count * self.page_size].tobytes()
        deeper = self.tree.insert(sequence.namespace.encode(), tokens, sequence.pages[:count])
        self.tree.pin(deeper)
        self.tree.unpin(node)
        sequence.tree_node = deeper
        sequence.cached_pages = count
        self._announce(sequence, sequence.prefill_end)
        if self.tier:
            self.tier.note(sequence, count)

    def reserve_snapshots(self, sequence: Sequence, start: int, end: int) -> tuple[tuple[int, int], ...]:
        """(position, snapshot) in order: where a slice [start, end) of a model with recurrent layers saves its state.

        At the last page border in front of the prompt's end, where the tree branches off, at the last border of a block
        of the tier, and at regular distances.
        """
        if self.options is None or not isinstance(sequence.tree_node, Node):
            return ()
        last = sequence.prefill_end - 1
        block = self.tier.sizes.block_tokens if self.tier else self.page_size
        points = (last - last % self.page_size, sequence.branch, last - last % block)
        wanted = borders(start, end, points, self.options.interval)
        taken = ((position, self.snapshots.take()) for position in wanted)
        return tuple(sorted((position, number) for position, number in taken if number is not None))

    def settle_snapshots(self, part: Slice, computed: bool) -> None:
        """A slice's results are there: its saved states become the tree's if they were `computed`, else free."""
        sequence = part.sequence
        if part.restores != NO_SNAPSHOT:
            self.snapshots.end_reading(part.restores)
        for position, number in part.saves:
            if computed:
                self.cache(sequence, position)
            if computed and sequence.cached_pages * self.page_size == position:
                assert isinstance(sequence.tree_node, Node)
                self.snapshots.attach(number, sequence.tree_node)
                if self.tier:
                    self.tier.note_state(sequence, position, sequence.tree_node.snapshot)
            else:
                self.snapshots.give(number)

    def release(self, sequence: Sequence, computed: int) -> None:
        """Take all pages back; the KV of the first `computed` positions is cached."""
        self.cache(sequence, computed)
        self._withdraw(sequence)
        self.pages.drop_reserve(sequence.pages[-1])
        self.pages.give(self.own_pages(sequence))
        if isinstance(sequence.tree_node, Node):
            self.tree.unpin(sequence.tree_node)
        sequence.pages, sequence.tree_node, sequence.cached_pages = [], None, 0

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

    def restore(self, fetch: Fetch, blocks: int) -> Restored:
        """Cache pages for the first `blocks` blocks of a fetch, as many as there is room for; they must be written now.

        None where the tree has lost the prefix in front of them.
        """
        assert self.tier is not None
        start, end = fetch.first * self.tier.block_pages, (fetch.first + blocks) * self.tier.block_pages
        width = self.tree.page_bytes
        node = self.tree.match(fetch.namespace, fetch.tokens[: end * width])
        prefix = self.tree.path_pages(node)
        if len(prefix) < start:
            return Restored([])
        self.tree.pin(node)
        count = min(end - len(prefix), self.available)
        self._make_free(count)
        pages = self.pages.take(count, after=prefix[-1] if prefix else 0)
        cached, deepest = len(prefix) + count, node
        if pages:
            deepest = self.tree.insert(fetch.namespace, fetch.tokens[: cached * width], prefix + pages)
        snapshot = self._snapshot_for(deepest) if cached == end and len(fetch.keys) > fetch.blocks else NO_SNAPSHOT
        self.tree.unpin(node)
        self.tier.restored += count
        return Restored(pages, len(prefix) - start, snapshot)

    def _snapshot_for(self, node: Node) -> int:
        """A snapshot for the state of a node, which must be written now; none where it has one, or none is free."""
        if node.snapshot != NO_SNAPSHOT or (number := self.snapshots.take()) is None:
            return NO_SNAPSHOT
        self.snapshots.attach(number, node)
        return number

    def forget(self, generation: int, free: bool, keep_tier: bool) -> None:
        """Another generation of KV has begun; `free` all cached pages that no sequence pins."""
        if self.tier:
            self.tier.begin(generation, keep_tier)
        if free:
            self.clear()

    def clear(self) -> None:
        """Free all cached pages that no sequence pins."""
        self.pages.give(self.tree.clear())

    def imbalance(self) -> str:
        """While no sequence is admitted: why the counts do not add up, or "". Constant time."""
        pages, tree = self.pages, self.tree
        if pages.free + tree.cached == pages.total and tree.cached == tree.evictable:
            return self.snapshots.imbalance()
        return f"free {pages.free} + cached {tree.cached} (pinned {tree.cached - tree.evictable}) of {pages.total}"

    def check_invariants(self, admitted: Iterable[Sequence]) -> None:
        """Assert that free, cached and held pages are disjoint and together all there are."""
        self.pages.check_invariants()
        free, cached = self.pages.free_pages(), self.tree.check_invariants()
        held = [page for sequence in admitted for page in self.own_pages(sequence)]
        counts = (len(free), len(held), len(cached), self.pages.total)
        assert sum(counts[:3]) == self.pages.total, counts
        assert len(free | cached | set(held)) == self.pages.total, counts

    def _pin_prefix(self, sequence: Sequence, reusable: int) -> tuple[Node | None, list[int], int]:
        """The pinned node at the end of the usable cached prefix, its pages, and how many tokens the tree holds.

        (None, [], 0) where none may be used. The tree holds more than is usable where a snapshot is missing.
        """
        if not self.reuse_prefixes or sequence.embeds:
            return None, [], 0
        usable = reusable - reusable % self.page_size
        node = self.tree.match(sequence.namespace.encode(), sequence.ids[:usable].tobytes())
        matched = self.tree.path_pages(node)
        prefix = matched
        if self.options:
            node = self.tree.with_snapshot(node)
            prefix = self.tree.path_pages(node)
        self.tree.pin(node)
        return node, prefix, len(matched) * self.page_size

    def _next_key(self, node: Node, sequence: Sequence, prefix_pages: int, reusable: int) -> object:
        """What identifies the pages that `sequence` computes next; None when they are not worth waiting for."""
        start = prefix_pages * self.page_size
        end = start + max(MIN_AWAITED_TOKENS, self.page_size)
        if end > reusable:
            return None
        namespace = "" if prefix_pages else sequence.namespace
        return node, namespace, sequence.ids[start:end].tobytes()

    def _announce(self, sequence: Sequence, prefill_end: int) -> None:
        """Record which prefix this sequence computes next, so that others can wait for it."""
        self._withdraw(sequence)
        if isinstance(sequence.tree_node, Node):
            key = self._next_key(sequence.tree_node, sequence, sequence.cached_pages, prefill_end)
            if key is not None and key not in self._in_computation:
                self._in_computation[key] = sequence
                sequence.announced = key

    def _withdraw(self, sequence: Sequence) -> None:
        if sequence.announced is not None:
            del self._in_computation[sequence.announced]
            sequence.announced = None

    def _make_free(self, count: int) -> None:
        """Evict cached pages until `count` are free."""
        if count > self.pages.free:
            self.pages.give(self.tree.evict(count - self.pages.free))


def empty_pool(config: PlannerConfig, tier: KvTier | None = None) -> PagePool:
    """The pool that a planner begins with."""
    return PagePool(config.page_size, config.total_pages, config.reuse_prefixes, config.snapshots, tier)
