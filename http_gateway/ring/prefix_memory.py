"""What a scheduler has probably cached: the beginnings of the prompts that were sent to it.

A prompt is cut into blocks of bytes, and each block is known by the hash of all blocks up to it, so the blocks of a
scheduler are a radix tree that is cut at these places. It is bounded, and forgets what was used longest ago. It works
with the bytes that clients send rather than with token ids, which the gateway does not have: equal bytes at the
beginning of two prompts become equal ids, but for a few at the end.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import zip_longest

import msgspec
import xxhash

from quartet.runtime.messages import Chat, Generate

BLOCK_BYTES = 256
MOST_BLOCKS = 1024  # of a prompt: what follows is not looked at
REMEMBERED_BLOCKS = 1 << 16  # of a scheduler: 16 MB of prompts
ENCODER = msgspec.msgpack.Encoder()


class PrefixMemory:
    """Of one scheduler."""

    def __init__(self) -> None:
        self._blocks: OrderedDict[int, None] = OrderedDict()  # used longest ago first

    def match(self, blocks: list[int]) -> int:
        """How many of a prompt's blocks are known, from its beginning on."""
        for count, block in enumerate(blocks):
            if block not in self._blocks:
                return count
        return len(blocks)

    def add(self, blocks: list[int]) -> None:
        """Remember a prompt. Its end is forgotten before its beginning."""
        for block in reversed(blocks):
            self._blocks[block] = None
            self._blocks.move_to_end(block)
        while len(self._blocks) > REMEMBERED_BLOCKS:
            self._blocks.popitem(last=False)

    def forget(self) -> None:
        self._blocks.clear()


class PromptBlocks:
    """`blocks_of` a prompt, computed once for the copies of it that come one after the other."""

    def __init__(self) -> None:
        self._key: tuple[object, ...] = ()
        self._blocks: list[int] = []

    def of(self, generate: Generate) -> list[int]:
        request = generate.request
        key = (generate.text, generate.chat, generate.input_ids, request.adapter, request.extra_key)
        if any(one is not other for one, other in zip_longest(key, self._key)):
            self._key, self._blocks = key, blocks_of(generate)
        return self._blocks


def blocks_of(generate: Generate) -> list[int]:
    """The hashes of a prompt's whole blocks, each with all before it. Empty where no prefix of it is shared."""
    namespace = f"{generate.request.adapter}/{generate.request.extra_key}"
    hashed = xxhash.xxh3_64(namespace.encode(errors="replace"))
    blocks: list[int] = []
    rest = b""
    for piece in pieces(generate):
        piece = rest + piece
        whole = min(len(piece) // BLOCK_BYTES, MOST_BLOCKS - len(blocks))
        for start in range(0, whole * BLOCK_BYTES, BLOCK_BYTES):
            hashed.update(piece[start : start + BLOCK_BYTES])
            blocks.append(hashed.intdigest())
        if len(blocks) == MOST_BLOCKS:
            break
        rest = piece[whole * BLOCK_BYTES :]
    return blocks


def pieces(generate: Generate) -> Iterator[bytes]:
    """The bytes of a prompt, in the order in which templates put them."""
    most = MOST_BLOCKS * BLOCK_BYTES
    if generate.text is not None:
        yield generate.text[:most].encode(errors="replace")
    elif generate.chat is not None:
        yield from pieces_of_chat(generate.chat)
    elif generate.input_ids:
        yield generate.input_ids[:most]


def pieces_of_chat(chat: Chat) -> Iterator[bytes]:
    try:
        yield ENCODER.encode((chat.template_kwargs, chat.tools, chat.documents))
        for message in chat.messages:
            yield ENCODER.encode(message)
    except (TypeError, ValueError, OverflowError, RecursionError):  # it will be refused, for the same reason
        return
