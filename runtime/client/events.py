"""Server-sent events from pieces of a body, in every form that the standard allows and servers write."""

import re
from collections.abc import Iterator

import msgspec

from quartet.runtime.client.connection import ClientError

FIELD = b"data"
END = b"[DONE]"
LINE_END = re.compile(rb"\r\n|\r|\n")
BYTE_ORDER_MARK = b"\xef\xbb\xbf"


class EventReader:
    """Reads the data of events, JSON each, from a stream that may be cut anywhere.

    Lines end with CR, LF or both; comments and other fields are left out. Data over several lines is joined. An event
    whose data is whole on one line is there with that line: the empty line behind it may be missing, as some servers
    leave it out.
    """

    def __init__(self, most_bytes: int | None = None) -> None:
        """`most_bytes`: of one event, where the server is not ours."""
        self._most_bytes = most_bytes
        self._rest = b""
        self._begun = self._after_return = False
        self._data: list[bytes] = []  # lines of an event that is not whole
        self._size = 0  # bytes of them
        self.ended = False  # the stream's last event has come

    def feed(self, piece: bytes) -> Iterator[bytes]:
        """The data of each event that is complete, up to the mark of the end.

        Raises ClientError for one that is too long.
        """
        if self._after_return:
            piece = piece.removeprefix(b"\n")  # of a line end that was cut in two
        if not piece:
            return
        self._after_return = piece.endswith(b"\r")
        *lines, self._rest = LINE_END.split(self._rest + piece)
        self._check(len(self._rest))
        for line in lines:
            if not self._begun:
                line, self._begun = line.removeprefix(BYTE_ORDER_MARK), True
            data = self._take(line)
            if data == END:
                self.ended = True
            if self.ended:
                return
            if data:
                yield data

    def _take(self, line: bytes) -> bytes:
        """The data of the event that ends with this line; empty where none does."""
        if not line:
            data, self._data, self._size = b"\n".join(self._data), [], 0
            return data
        name, _, value = line.partition(b":")
        if name != FIELD:
            return b""
        value = value.strip()
        if not self._data and is_whole(value):
            return value
        self._data.append(value)
        self._size += len(value)
        self._check(self._size)
        return b""

    def _check(self, size: int) -> None:
        if self._most_bytes is not None and size > self._most_bytes:
            raise ClientError(f"the server sent an event of more than {self._most_bytes} bytes")


def is_whole(data: bytes) -> bool:
    """Whether a line of data is all there is: the end of the stream, or one JSON value."""
    if data == END:
        return True
    try:
        msgspec.json.decode(data, type=msgspec.Raw)
    except (msgspec.DecodeError, RecursionError):
        return False
    return True
