"""Counts what a JSON body holds while it arrives, before anything is built of it.

A list of two characters becomes an object of a hundred bytes, and a request of thousands. So the strings, lists and
objects of a body are counted in its bytes, part by part, and too many are refused before they are decoded. Commas are
counted as well, for numbers: they cost little, but more than their digits.
"""

COUNTED = b'"[{,'
_OTHERS = bytes(byte for byte in range(256) if byte not in COUNTED)


class ValueCounter:
    """How many strings (keys too), lists and objects have begun in the parts so far, and the commas between values.

    Bytes that are no JSON count too. Every part costs a few passes over it, whatever is in it.
    """

    def __init__(self) -> None:
        self.values = 0
        self.commas = 0
        self._in_string = False
        self._carried = b""  # a backslash whose partner is in the next part

    def feed(self, part: bytes) -> None:
        pieces = self._unescaped(self._carried + part).translate(None, _OTHERS).split(b'"')
        quotes = len(pieces) - 1
        outside = pieces[self._in_string :: 2]
        commas = sum(piece.count(b",") for piece in outside)
        self.commas += commas
        self.values += sum(map(len, outside)) - commas + (quotes + (not self._in_string)) // 2
        self._in_string ^= quotes % 2 == 1

    def _unescaped(self, part: bytes) -> bytes:
        """The part without its escapes of quotes and backslashes; in JSON a backslash is always inside a string."""
        self._carried = b""
        if b"\\" not in part:
            return part
        part = part.replace(b"\\\\", b"")
        if part.endswith(b"\\"):
            part, self._carried = part[:-1], b"\\"
        return part.replace(b'\\"', b"")
