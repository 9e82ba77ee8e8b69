"""The prefix cache: a radix tree over whole pages of token ids, with the KV pages that hold them.

An edge is a run of tokens as bytes (int32 each), so that two runs are compared by one memory comparison, at page size
1 as well. A node owns the pages of its edge. A sequence that computes behind a node pins it: a pinned node and its
ancestors are not evicted. All others can be, least recently used leaf first. The edges at the root begin with a
namespace, so what was cached under one is never matched under another. A node may have a snapshot: the recurrent state
behind its last page (snapshots.py). It loses it when it loses that page.
"""

from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import chain

from quartet.scheduler_service.core.snapshots import NO_SNAPSHOT, Snapshots

TOKEN_BYTES = 4


class Node:
    """A run of pages that follow its parent's. After a split, this object is the lower part, so pins stay valid."""

    __slots__ = ("children", "edge", "key", "pages", "parent", "pins", "queued", "snapshot", "used_at")

    def __init__(self, edge: bytes, key: bytes, pages: list[int], parent: "Node | None", used_at: int) -> None:
        self.edge = edge  # its key in parent.children: the first page of `key`; at the root, after the namespace
        self.key = key
        self.pages = pages
        self.parent = parent  # None: the root, or no longer in the tree
        self.children: dict[bytes, Node] = {}
        self.pins = 0
        self.used_at = used_at
        self.queued = False  # has an entry in the eviction heap
        self.snapshot = NO_SNAPSHOT  # of the state behind the last page


class PrefixTree:
    """Holds `cached` pages, of which `evictable` are not pinned."""

    def __init__(self, page_size: int, snapshots: Snapshots | None = None) -> None:
        self.page_bytes = page_size * TOKEN_BYTES
        self.snapshots = snapshots or Snapshots(0)
        self.root = Node(b"", b"", [], None, 0)
        self.cached = 0
        self.evictable = 0
        self.evicted = 0  # pages since the start
        self._uses = 0  # logical time of last use
        self._heap: list[tuple[int, int, Node]] = []  # (used_at, serial, leaf); entries may be out of date
        self._serial = 0  # of heap entries: nodes cannot be compared

    def match(self, namespace: bytes, tokens: bytes) -> Node:
        """The node at the end of the longest cached prefix of `tokens`, in whole pages; the root if there is none."""
        node, _, partial, shared = self._walk(namespace, tokens)
        if partial:
            node = self._split(partial, shared)
        self._touch(node)
        return node

    def matched_pages(self, namespace: bytes, tokens: bytes) -> int:
        """How many pages `match` would find; changes nothing."""
        _, at, _, shared = self._walk(namespace, tokens)
        return (at + shared) // self.page_bytes

    def matched_snapshot_pages(self, namespace: bytes, tokens: bytes) -> int:
        """How many pages lead to the deepest node with a snapshot that `match` would pass; changes nothing."""
        node = self.with_snapshot(self._walk(namespace, tokens)[0])
        return sum(len(n.pages) for n in self._path(node))

    def with_snapshot(self, node: Node) -> Node:
        """The deepest of `node` and its ancestors that has a snapshot; the root if none has."""
        while node.parent is not None and node.snapshot == NO_SNAPSHOT:
            node = node.parent
        return node

    def insert(self, namespace: bytes, tokens: bytes, pages: list[int]) -> Node:
        """Cache `pages` as the KV of `tokens` where none is cached yet; returns the node at their end.

        Afterwards the tree owns those of `pages` that `path_pages` of that node names, and no others.
        """
        assert len(tokens) == len(pages) * self.page_bytes, (len(tokens), len(pages))
        node, at, partial, shared = self._walk(namespace, tokens)
        if partial:
            node = self._split(partial, shared)
            at += shared
        if at < len(tokens):
            edge = (b"" if at else namespace) + tokens[at : at + self.page_bytes]
            node = Node(edge, tokens[at:], pages[at // self.page_bytes :], node, self._uses)
            self._attach(node)
            self.cached += len(node.pages)
            self.evictable += len(node.pages)
        self._touch(node)
        self._queue_for_eviction(node)
        return node

    def path_pages(self, node: Node) -> list[int]:
        """The pages of the whole prefix that ends at `node`, in order."""
        runs = [n.pages for n in self._path(node)]
        return list(chain.from_iterable(reversed(runs)))

    def pin(self, node: Node) -> None:
        for n in self._path(node):
            if not n.pins:
                self.evictable -= len(n.pages)
            n.pins += 1

    def unpin(self, node: Node) -> None:
        for n in self._path(node):
            assert n.pins > 0
            n.pins -= 1
            if not n.pins:
                self.evictable += len(n.pages)
                self._queue_for_eviction(n)

    def evict(self, count: int) -> list[int]:
        """Remove and return at least min(count, evictable) pages, from the ends of the least recently used leaves."""
        pages: list[int] = []
        while len(pages) < count and self._heap:
            used_at, _, node = heappop(self._heap)
            node.queued = False
            if node.pins or node.children or node.parent is None:
                continue
            if node.used_at == used_at:
                pages += self._trim(node, count - len(pages))
            else:
                self._queue_for_eviction(node)
        self.evicted += len(pages)
        return pages

    def clear(self) -> list[int]:
        """Remove everything that is not pinned; returns its pages."""
        return self.evict(self.cached)

    def check_invariants(self) -> set[int]:
        """Assert every invariant; returns the pages that the tree owns."""
        owned: list[int] = []
        unpinned = 0
        for node in self._all():
            if node.parent is None:
                continue
            assert node.pages and len(node.key) == len(node.pages) * self.page_bytes, (len(node.key), len(node.pages))
            assert node.parent.parent is None or node.parent.pins >= node.pins, (node.parent.pins, node.pins)
            assert node.parent.children[node.edge] is node and node.edge.endswith(node.key[: self.page_bytes])
            assert node.pins or node.children or node.queued, "an evictable leaf is not in the heap"
            owned += node.pages
            unpinned += 0 if node.pins else len(node.pages)
        assert len(owned) == len(set(owned)) == self.cached, (len(owned), len(set(owned)), self.cached)
        assert unpinned == self.evictable, (unpinned, self.evictable)
        self.snapshots.check_invariants(self._all())
        return set(owned)

    def _walk(self, namespace: bytes, tokens: bytes) -> "tuple[Node, int, Node | None, int]":
        """(deepest node that matches whole, bytes matched up to its end, child that matches in part, bytes of that)."""
        width = self.page_bytes
        node, at, edge = self.root, 0, namespace
        end = len(tokens) - len(tokens) % width
        while at < end:
            child = node.children.get(edge + tokens[at : at + width])
            if child is None:
                break
            if at + len(child.key) > end or not tokens.startswith(child.key, at):
                return node, at, child, self._shared(child.key, tokens, at, end)
            node, at, edge = child, at + len(child.key), b""
        return node, at, None, 0

    def _shared(self, key: bytes, tokens: bytes, at: int, end: int) -> int:
        """Length of the common prefix of `key` and `tokens[at:end]`, whole pages; the first page is known equal."""
        width = self.page_bytes
        low, high = 1, min(len(key), end - at) // width
        while low < high:
            middle = (low + high + 1) // 2
            if tokens.startswith(key[low * width : middle * width], at + low * width):
                low = middle
            else:
                high = middle - 1
        return low * width

    def _split(self, node: Node, at: int) -> Node:
        """Cut the edge of `node` after `at` bytes; returns the new upper part."""
        assert node.parent is not None and 0 < at < len(node.key), (at, len(node.key))
        count = at // self.page_bytes
        upper = Node(node.edge, node.key[:at], node.pages[:count], node.parent, node.used_at)
        upper.pins = node.pins
        node.key, node.pages, node.parent = node.key[at:], node.pages[count:], upper
        node.edge = node.key[: self.page_bytes]
        self._attach(upper)
        self._attach(node)
        return upper

    def _attach(self, node: Node) -> None:
        assert node.parent is not None
        node.parent.children[node.edge] = node

    def _touch(self, node: Node) -> None:
        self._uses += 1
        for n in self._path(node):
            n.used_at = self._uses

    def _queue_for_eviction(self, node: Node) -> None:
        """Put an evictable leaf into the heap, once."""
        if not (node.pins or node.children or node.queued or node.parent is None):
            self._serial += 1
            node.queued = True
            heappush(self._heap, (node.used_at, self._serial, node))

    def _trim(self, leaf: Node, count: int) -> list[int]:
        """Remove up to `count` pages from the end of an unpinned leaf, and the leaf when none is left; returns them."""
        dropped = leaf.pages[-count:]
        if leaf.snapshot != NO_SNAPSHOT:
            self.snapshots.drop(leaf)
        self.cached -= len(dropped)
        self.evictable -= len(dropped)
        if len(dropped) < len(leaf.pages):
            del leaf.pages[-count:]
            leaf.key = leaf.key[: -count * self.page_bytes]
            self._queue_for_eviction(leaf)
            return dropped
        parent = leaf.parent
        assert parent is not None
        leaf.parent = None
        del parent.children[leaf.edge]
        self._queue_for_eviction(parent)
        return dropped

    def _path(self, node: Node) -> Iterator[Node]:
        """`node` and its ancestors, without the root."""
        while node.parent is not None:
            yield node
            node = node.parent

    def _all(self) -> Iterator[Node]:
        stack = [self.root]
        while stack:
            node = stack.pop()
            yield node
            stack += node.children.values()
