"""The names of blocks of KV: hashes of everything that their contents follow from.

A block is a fixed number of tokens behind a prefix. Its key is a hash of the key in front of it and of its own ids, as
in a chain, so it stands for the whole prefix. The first one hangs on a root: a hash of who computed (the identity of
weights and layout) and of the namespace of the prefix cache.
"""

from array import array
from hashlib import blake2b

KEY_BYTES = 20


def digest(*parts: bytes) -> bytes:
    """One hash of several byte strings, wherever one ends and the next begins."""
    hash = blake2b(digest_size=KEY_BYTES)
    for part in parts:
        hash.update(len(part).to_bytes(8, "little"))
        hash.update(part)
    return hash.digest()


class BlockKeys:
    """The keys of the blocks of one growing sequence, made as they are asked for."""

    __slots__ = ("_keys", "fetched", "root")

    def __init__(self, root: bytes) -> None:
        self.root = root
        self.fetched = b""  # the last piece of the state that was fetched last for this sequence
        self._keys: list[bytes] = []

    def first(self, count: int, ids: "array[int]", block_tokens: int) -> list[bytes]:
        """The keys of the first `count` blocks of `ids`, which holds as many whole ones at least."""
        keys = self._keys
        for number in range(len(keys), count):
            own = ids[number * block_tokens : (number + 1) * block_tokens]
            assert len(own) == block_tokens, (len(ids), count, block_tokens)
            keys.append(digest(keys[-1] if keys else self.root, own.tobytes()))
        return keys[:count]


def state_keys(block: bytes, pieces: int) -> list[bytes]:
    """The names of the pieces of the recurrent state behind a block."""
    return [digest(block, b"state", number.to_bytes(4, "little")) for number in range(pieces)]
