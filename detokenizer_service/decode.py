"""Incremental decoding: token ids come in, characters go out, never half of one.

The text of a request is `decode(prompt tail + output)` without what the prompt tail alone decodes to, and it does not
depend on how the output was cut into messages. Two ways lead there:

ByteDecoder    byte-level and byte-fallback tokenizers, where a token is a run of bytes: a table and an incremental
               UTF-8 decoder. The table is all that is kept of the tokenizer, which takes some ten times as much
WindowDecoder  all others: decode a short window with and without the new token and take the difference

Where byte-fallback tokens spell invalid UTF-8, the characters that were whole before the fault stay (they may have
been sent), though decoding the whole at once would lose them too. `spaces_between_special_tokens` changes nothing
here, as with transformers' own fast tokenizers.
"""

import codecs
from collections.abc import Callable, Iterable
from itertools import groupby
from typing import TYPE_CHECKING, Protocol

from quartet.detokenizer_service.spelling import Spelling, spelling_of
from quartet.detokenizer_service.token_strings import token_strings

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPLACEMENT = "\ufffd"
MOST_PIECES = 1 << 14  # whose bytes are at hand
MOST_HELD = 256  # tokens that are decoded again with each further one; what ends in U+FFFD then is no half character


class Decoder(Protocol):
    """The decoding state of one request."""

    def feed(self, ids: Iterable[int]) -> str:
        """The characters that these ids complete."""

    def flush(self) -> str:
        """What is held back, now that no more ids come; an unfinished character is U+FFFD."""


class Pieces(dict[int, bytes]):
    """Token id → its bytes, made when first asked for; nothing for skipped and unknown ids."""

    def __init__(self, token_of: Callable[[int], str], spelling: Spelling, skipped: frozenset[int]) -> None:
        super().__init__()
        self._token_of = token_of
        self._spelling = spelling
        self._skipped = skipped

    def __missing__(self, id: int) -> bytes:
        if len(self) >= MOST_PIECES:
            self.clear()
        token = "" if id in self._skipped else self._token_of(id)
        piece = self[id] = self._spelling.bytes_of(token)
        return piece


class ByteDecoder:
    """Concatenates the bytes of tokens and cuts them between characters."""

    def __init__(self, pieces: Pieces, spelling: Spelling) -> None:
        self._piece = pieces.__getitem__
        self._utf8 = codecs.getincrementaldecoder("utf-8")(spelling.errors)
        self._strips = spelling.strips_first

    def feed(self, ids: Iterable[int]) -> str:
        data = b"".join(map(self._piece, ids))
        if self._strips and data:
            self._strips = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class WindowDecoder:
    """Decodes the tokens last sent together with the new ones; what the former alone give is left out."""

    def __init__(self, tokenizer: "Tokenizer", prompt_tail: Iterable[int], skip: bool, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._skipped = special if skip else frozenset[int]()
        self._window = [id for id in prompt_tail if self._visible(id)]
        self._sent = len(self._window)  # ids of the window whose text has left
        self._sent_text = self._text().rstrip(REPLACEMENT)

    def feed(self, ids: Iterable[int]) -> str:
        return "".join([self._step(id) for id in ids if self._visible(id)])  # a token at a time, whatever the message

    def flush(self) -> str:
        return self._advance(self._text())

    def _step(self, id: int) -> str:
        self._window.append(id)
        text, held = self._text(), len(self._window) - self._sent
        return "" if text.endswith(REPLACEMENT) and held <= MOST_HELD else self._advance(text)

    def _advance(self, text: str) -> str:
        new = text[len(self._sent_text) :]
        if new:
            self._window = self._window[self._sent :]
            self._sent = len(self._window)
            self._sent_text = self._text()
        return new

    def _text(self) -> str:
        return self._tokenizer.decode(self._window, skip_special_tokens=False)

    def _visible(self, id: int) -> bool:
        return id not in self._skipped and self._tokenizer.id_to_token(id) is not None


class Spelled:
    """A vocabulary whose tokens are runs of bytes."""

    def __init__(self, tokenizer: "Tokenizer", spelling: Spelling, special: frozenset[int]) -> None:
        strings = token_strings(tokenizer)
        self._spelling = spelling
        self._pieces = Pieces(strings, spelling, frozenset())
        self._without_special = Pieces(strings, spelling, special)
        self._bytes = frozenset(spelling.byte_ids(tokenizer))

    def decoder(self, prompt_tail: Iterable[int], skip: bool) -> Decoder:
        decoder = ByteDecoder(self._pieces_for(skip), self._spelling)
        decoder.feed(prompt_tail)
        return decoder

    def decode(self, ids: Iterable[int], skip: bool) -> str:
        piece = self._pieces_for(skip).__getitem__
        if self._bytes:
            runs = groupby(filter(piece, ids), self._bytes.__contains__)
            text = "".join([run_text(b"".join(map(piece, run)), bytes_only) for bytes_only, run in runs])
        else:
            text = b"".join(map(piece, ids)).decode("utf-8", self._spelling.errors)
        return text.removeprefix(" ") if self._spelling.strips_first else text

    def token_bytes(self, id: int) -> bytes:
        return self._pieces[id]

    def _pieces_for(self, skip: bool) -> Pieces:
        return self._without_special if skip else self._pieces


class Unspelled:
    """Any other vocabulary: the tokenizer decodes."""

    def __init__(self, tokenizer: "Tokenizer", special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._token_bytes: dict[int, bytes] = {}

    def decoder(self, prompt_tail: Iterable[int], skip: bool) -> Decoder:
        return WindowDecoder(self._tokenizer, prompt_tail, skip, self._special)

    def decode(self, ids: Iterable[int], skip: bool) -> str:
        [text] = self._tokenizer.decode_batch([list(ids)], skip_special_tokens=skip)  # without Python's lock
        return text

    def token_bytes(self, id: int) -> bytes:
        found = self._token_bytes.get(id)
        if found is None:
            found = self._token_bytes[id] = self._tokenizer.decode([id], skip_special_tokens=False).encode()
        return found


class Vocabulary:
    """A model's tokenizer, as the detokenizer sees it: makes decoders, decodes whole sequences and single tokens."""

    def __init__(self, tokenizer: "Tokenizer") -> None:
        added = tokenizer.get_added_tokens_decoder()
        self._special = frozenset(id for id, token in added.items() if token.special)
        spelling = spelling_of(tokenizer)
        self._tokens: Spelled | Unspelled
        if spelling is None:
            self._tokens = Unspelled(tokenizer, self._special)
        else:
            self._tokens = Spelled(tokenizer, spelling, self._special)

    def decoder(self, prompt_tail: Iterable[int] = (), skip_special_tokens: bool = True) -> Decoder:
        """A decoder for the output behind a prompt that ends with these ids."""
        return self._tokens.decoder(prompt_tail, skip_special_tokens)

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a whole sequence. Raises OverflowError on a negative id."""
        return self._tokens.decode(ids, skip_special_tokens)

    def token_bytes(self, id: int) -> bytes:
        """What one token adds to a text, in UTF-8, special ones included. Known exactly where tokens are bytes."""
        return self._tokens.token_bytes(id)

    def is_special(self, id: int) -> bool:
        return id in self._special

    def decode_open(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of a sequence that goes on: a character whose bytes are not all there is left to what follows."""
        return self.decoder(skip_special_tokens=skip_special_tokens).feed(ids)


def run_text(run: bytes, bytes_only: bool) -> str:
    """The text of neighbouring tokens of one kind; tokens of single bytes that spell no UTF-8 are U+FFFD each."""
    try:
        return run.decode()
    except UnicodeDecodeError:
        assert bytes_only, run
        return REPLACEMENT * len(run)
