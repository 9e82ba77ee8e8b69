"""The strings of all tokens in one piece of memory."""

from array import array
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer


class TokenStrings:
    """Token id → its string, for the ids from 0 on."""

    def __init__(self, strings: Iterable[str]) -> None:
        data, ends = bytearray(), array("Q", [0])
        for string in strings:
            data += string.encode()
            ends.append(len(data))
        self._data = bytes(data)
        self._ends = ends

    def __call__(self, id: int) -> str:
        """Empty for an id without a token. Raises OverflowError for a negative one."""
        if id < 0:
            raise OverflowError(f"token {id} is negative")
        return "" if id >= len(self._ends) - 1 else self._data[self._ends[id] : self._ends[id + 1]].decode()


def token_strings(tokenizer: "Tokenizer") -> Callable[[int], str]:
    """Token id → its string, added ones included; the tokenizer itself where some ids below the largest are free."""
    ids = range(tokenizer.get_vocab_size())

    def string_of(id: int) -> str:
        return tokenizer.id_to_token(id) or ""

    if any(tokenizer.id_to_token(id) is None for id in ids):
        return string_of
    return TokenStrings(map(string_of, ids))
