"""What the tier behind the KV pool holds, and what is to be done there: values in, values out, no memory and no disk.

The tier keeps blocks of KV on up to two levels, host memory and files. Blocks are written through: as soon as the
prefix tree has one whole, a `Store` asks for a copy, so the tree may evict it at any time. A request whose prefix goes
on here behind what the tree has waits in the queue while a `Fetch` runs; the blocks become pages of the tree
(`PagePool.restore`), where the request finds them. A fetch that takes too long is given up: its blocks count as absent
until its end is known.

A model with recurrent layers needs the state behind the last token of a prefix too. Where a snapshot of it was saved
at the end of a block, it is kept in pieces as large as a block, under keys of their own, and a prefix counts up to the
last block whose state is there whole.

`commands` is what whoever owns memory and disk carries out, in order. Both levels are bounded; the least recently used
block goes first, the end of a prefix before its beginning. Blocks are never matched across generations: a change of the
weights clears the tier, and what an earlier generation has computed is not stored any more.
"""

from collections import OrderedDict
from collections.abc import Iterable
from collections.abc import Sequence as Listed
from dataclasses import dataclass

from quartet.scheduler_service.core.block_keys import BlockKeys, digest, state_keys
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.core.tier_acts import DropFile, DropMemory, Store

READABLE = 0  # the serial of a block that nobody is writing
MOST_FETCHES = 8  # at once


@dataclass(frozen=True, slots=True)
class TierSizes:
    """How much the tier may hold and do at once, in blocks; a level of 0 is off."""

    block_tokens: int  # a multiple of the page size
    block_bytes: int  # of KV
    memory_blocks: int
    file_blocks: int
    most_pending: int  # that wait to be written to files; beyond it, blocks are not kept
    most_fetched: int  # of one fetch; a longer prefix comes in several
    state_pieces: int = 0  # of a snapshot of recurrent state; 0: the model has none


@dataclass(frozen=True, slots=True)
class Forget:
    """Forget all blocks of both levels."""


@dataclass(slots=True)
class Fetch:
    """Get these blocks, those in `files` from there and the others from memory; answered by `KvTier.arrived`."""

    number: int
    keys: list[bytes]
    files: frozenset[bytes]
    blocks: int  # how many of the keys, the first ones, are blocks; those behind them are pieces of the state
    first: int  # which block of the prefix keys[0] is
    namespace: bytes
    tokens: bytes  # int32 ids of the prefix, up to the last block's end
    given_up: bool = False


Command = Store | DropMemory | DropFile | Forget | Fetch


class Shelf:
    """The keys of one level, least recently used first, and which of them are still being written."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._serials: OrderedDict[bytes, int] = OrderedDict()

    def __len__(self) -> int:
        return len(self._serials)

    def __contains__(self, key: bytes) -> bool:
        return key in self._serials

    def is_readable(self, key: bytes) -> bool:
        return self._serials.get(key) == READABLE

    def put(self, key: bytes, serial: int = READABLE) -> list[bytes]:
        """Add a block; returns those that have to go for it."""
        self._serials[key] = serial
        self._serials.move_to_end(key)
        return [self._serials.popitem(last=False)[0] for _ in range(len(self._serials) - self.capacity)]

    def written(self, key: bytes, serial: int, ok: bool) -> None:
        """The write of this serial has ended; nothing where the block was dropped or stored again meanwhile."""
        if self._serials.get(key) == serial:
            if ok:
                self._serials[key] = READABLE
            else:
                del self._serials[key]

    def touch(self, keys: Listed[bytes]) -> None:
        """The blocks of a prefix are used: the first one goes last."""
        for key in reversed(keys):
            if key in self._serials:
                self._serials.move_to_end(key)

    def discard(self, key: bytes) -> bool:
        """Whether it was there."""
        return self._serials.pop(key, None) is not None

    def clear(self) -> None:
        self._serials.clear()

    @property
    def unwritten(self) -> int:
        return sum(serial != READABLE for serial in self._serials.values())


class KvTier:
    """The books of both levels. Closed, it finds and keeps nothing, until `open` says whose KV it holds."""

    def __init__(self, page_size: int, sizes: TierSizes) -> None:
        assert sizes.block_tokens % page_size == 0, (sizes.block_tokens, page_size)
        self.sizes = sizes
        self.block_pages = sizes.block_tokens // page_size
        self.memory, self.files = Shelf(sizes.memory_blocks), Shelf(sizes.file_blocks)
        self.commands: list[Command] = []  # emptied by whoever carries them out
        self.fetches: dict[int, Fetch] = {}
        self.pending = 0  # blocks on their way to files
        self.stored = self.skipped = self.restored = self.damaged = self.given_up = self.evicted = 0  # blocks, in all
        self._fetching: dict[bytes, Fetch] = {}  # by each of its keys
        self._generation = "0"  # as namespaces begin
        self._identity: bytes | None = None  # None: closed
        self._adapters = b""
        self._serial = 0

    def open(self, identity: bytes, adapters: bytes, known: Iterable[bytes] = ()) -> None:
        """Hold KV of this identity from now on. `known`: blocks whose files are there, least recently used first.

        `adapters`: what else the versions of adapters must be taken with to mean the same.
        """
        self._identity, self._adapters = identity, adapters
        for key in known:
            self._drop_files(self.files.put(key))

    def begin(self, generation: int, keep: bool) -> None:
        """KV of another generation is neither kept nor restored from now on. Unless `keep`, all goes and it closes."""
        self._generation = str(generation)
        self.fetches.clear()
        self._fetching.clear()
        left, self.commands = self.commands, []
        for command in left:
            if isinstance(command, Store):  # the pages may be gone
                self._unstore(command)
            elif not isinstance(command, Fetch):
                self.commands.append(command)
        if not keep:
            self._identity = None
            self.memory.clear()
            self.files.clear()
            self.commands.append(Forget())

    # blocks go in

    def note(self, sequence: Sequence, pages: int) -> None:
        """The first `pages` pages of an admitted sequence are computed: keep their blocks, and count them as used."""
        keys = self._keys(sequence, pages // self.block_pages)
        for shelf in (self.memory, self.files):
            shelf.touch(keys)
        for number, key in enumerate(keys):
            own = sequence.pages[number * self.block_pages : (number + 1) * self.block_pages]
            memory = number < self.memory.capacity and key not in self.memory
            file = number < self.files.capacity and key not in self.files
            if file and self.pending >= self.sizes.most_pending:
                self.skipped += 1
                if not memory:
                    break  # what follows would not be reached
                file = False
            if memory or file:
                self._store(Store(key, own, self._next_serial(), memory, file))
        for shelf in (self.memory, self.files):
            shelf.touch(keys)

    def note_state(self, sequence: Sequence, position: int, snapshot: int) -> None:
        """The recurrent state behind so many positions, which are cached, is in a snapshot: keep it."""
        pieces, count = self.sizes.state_pieces, position // self.sizes.block_tokens
        if not pieces or position % self.sizes.block_tokens or not (blocks := self._keys(sequence, count)):
            return
        keys = state_keys(blocks[-1], pieces)
        room = count + pieces
        in_memory = room <= self.memory.capacity
        in_files = room <= self.files.capacity and self.pending + pieces <= self.sizes.most_pending
        for piece, key in enumerate(keys):
            memory, file = in_memory and key not in self.memory, in_files and key not in self.files
            if memory or file:
                self._store(Store(key, [], self._next_serial(), memory, file, snapshot, piece))
        for shelf in (self.memory, self.files):
            shelf.touch(keys)

    def _next_serial(self) -> int:
        self._serial += 1
        return self._serial

    def _store(self, command: Store) -> None:
        self.stored += 1
        if command.memory:
            self._drop_memory(self.memory.put(command.key))
        if command.file:
            self.pending += 1
            self._drop_files(self.files.put(command.key, command.serial))
        self.commands.append(command)

    def _unstore(self, command: Store) -> None:
        """A block that was not copied."""
        self.stored -= 1
        if command.memory:
            self.memory.discard(command.key)
        if command.file:
            self.written(command.key, command.serial, ok=False)

    def refuse(self, command: Store) -> None:
        """The pages of a `Store` cannot be copied any more."""
        self._unstore(command)

    def written(self, key: bytes, serial: int, ok: bool) -> None:
        """A block is in its file, or could not be written."""
        self.pending -= 1
        self.files.written(key, serial, ok)

    def _drop_memory(self, keys: Iterable[bytes]) -> None:
        self.commands += map(DropMemory, keys)

    def _drop_files(self, keys: Listed[bytes]) -> None:
        self.evicted += len(keys)
        self.commands += map(DropFile, keys)

    # blocks come back

    def awaits(self, sequence: Sequence, cached: int, usable: int) -> bool:
        """Whether a sequence, of which the tree has `cached` pages and may use `usable`, waits for blocks of the tier.

        Begins to fetch them, where nobody does.
        """
        first, last = cached // self.block_pages, usable // self.block_pages
        keys = self._keys(sequence, last)[first:]
        if not keys:
            return False
        if (theirs := self._fetching.get(keys[0])) is not None:
            return not theirs.given_up
        found, state = self._with_state(sequence, self._found(keys))
        gained = (first + len(found)) * self.block_pages - cached
        if 2 * gained < self.block_pages or not found:
            return False
        if len(self.fetches) < MOST_FETCHES:
            self._fetch(sequence, found, state, first)
            return True
        return any(not fetch.given_up for fetch in self.fetches.values())  # else the disk hangs: go on without

    def _found(self, keys: list[bytes]) -> list[bytes]:
        """Those at the beginning of `keys` that can be fetched now, by one fetch."""
        found: list[bytes] = []
        for key in keys[: self.sizes.most_fetched]:
            if not self._is_readable(key):
                break
            found.append(key)
        return found

    def _is_readable(self, key: bytes) -> bool:
        return key not in self._fetching and (self.memory.is_readable(key) or self.files.is_readable(key))

    def _with_state(self, sequence: Sequence, found: list[bytes]) -> tuple[list[bytes], list[bytes]]:
        """Those of the blocks found that can be used, up to the last one with a state, and the pieces of that.

        A state is fetched once for a sequence: where there was no room for it, it is computed.
        """
        if not self.sizes.state_pieces:
            return found, []
        assert sequence.block_keys is not None
        for count in range(len(found), 0, -1):
            keys = state_keys(found[count - 1], self.sizes.state_pieces)
            if all(map(self._is_readable, keys)):
                return ([], []) if sequence.block_keys.fetched == keys[-1] else (found[:count], keys)
        return [], []

    def _fetch(self, sequence: Sequence, blocks: list[bytes], state: list[bytes], first: int) -> None:
        end, keys = (first + len(blocks)) * self.sizes.block_tokens, blocks + state
        files = frozenset(key for key in keys if key not in self.memory)
        tokens = sequence.ids[:end].tobytes()
        if state and sequence.block_keys is not None:
            sequence.block_keys.fetched = state[-1]
        fetch = Fetch(self._next_serial(), keys, files, len(blocks), first, sequence.namespace.encode(), tokens)
        self.fetches[fetch.number] = fetch
        self._fetching.update(dict.fromkeys(keys, fetch))
        self.commands.append(fetch)

    def give_up(self, number: int) -> None:
        """Whoever waits for this fetch goes on without it."""
        if fetch := self.fetches.get(number):
            fetch.given_up = True
            self.given_up += len(fetch.keys)

    def arrived(self, number: int, good: int, damaged: bytes | None = None) -> Fetch | None:
        """A fetch has ended: its first `good` blocks are there; the file of one may be `damaged` or gone.

        Where one is, those behind it may be too, which nobody has read: all of them are written again.
        Returns it for `PagePool.restore`; None where nobody wants it any more.
        """
        fetch = self.fetches.pop(number, None)
        if fetch is None:
            return None
        for key in fetch.keys:
            del self._fetching[key]
        if damaged is not None:
            gone = [key for key in fetch.keys[fetch.keys.index(damaged) :] if self.files.discard(key)]
            self.damaged += damaged in gone
            self.commands += map(DropFile, gone)
        whole = good == len(fetch.keys) or not self.sizes.state_pieces  # blocks are of no use without the state
        return fetch if good and whole and not fetch.given_up else None

    def keep(self, key: bytes) -> bool:
        """A block has come from its file: whether it stays in memory too."""
        if not self.memory.capacity or key in self.memory:
            return False
        self._drop_memory(self.memory.put(key))
        return True

    # keys

    def _keys(self, sequence: Sequence, count: int) -> list[bytes]:
        """The keys of the first `count` blocks; none where the tier has nothing to do with the sequence."""
        generation, _, namespace = sequence.namespace.partition("/")
        if self._identity is None or generation != self._generation or count <= 0:
            return []
        adapters = self._adapters if not namespace.startswith("/") else b""
        root = digest(self._identity, adapters, namespace.encode())
        if sequence.block_keys is None or sequence.block_keys.root != root:
            sequence.block_keys = BlockKeys(root)
        return sequence.block_keys.first(count, sequence.ids, self.sizes.block_tokens)

    # figures and checks

    def counters(self) -> dict[str, int]:
        """What the tier holds and has done, for `Probe`."""
        size, tokens = self.sizes.block_bytes, self.sizes.block_tokens
        return {
            "kv_tier_memory_tokens": len(self.memory) * tokens,
            "kv_tier_memory_bytes": len(self.memory) * size,
            "kv_tier_file_tokens": len(self.files) * tokens,
            "kv_tier_file_bytes": len(self.files) * size,
            "kv_tier_fetches": len(self.fetches),
            "kv_tier_stored_tokens_total": self.stored * tokens,
            "kv_tier_skipped_tokens_total": self.skipped * tokens,
            "kv_tier_restored_tokens_total": self.restored * tokens // self.block_pages,
            "kv_tier_evicted_tokens_total": self.evicted * tokens,
            "kv_tier_given_up_tokens_total": self.given_up * tokens,
            "kv_tier_damaged_blocks_total": self.damaged,
        }

    def check(self) -> None:
        """Assert that the books agree with each other."""
        for shelf in (self.memory, self.files):
            assert len(shelf) <= shelf.capacity, (len(shelf), shelf.capacity)
        assert self.memory.unwritten == 0 and 0 <= self.files.unwritten <= self.pending, self.pending
        assert self.pending <= self.sizes.most_pending, (self.pending, self.sizes.most_pending)
        keys = [key for fetch in self.fetches.values() for key in fetch.keys]
        assert len(keys) == len(set(keys)) and set(keys) == self._fetching.keys(), (len(keys), len(self._fetching))
        assert len(self.fetches) <= MOST_FETCHES, len(self.fetches)
