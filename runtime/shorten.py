"""Texts from outside that get into messages and logs: as long as a line can bear, and nothing but printable."""

import re

MAX_CHARS = 120
TAIL_CHARS = 30


def short(text: object, max_chars: int = MAX_CHARS) -> str:
    """The text, its middle left out where it is long, control characters escaped."""
    whole = str(text)
    if len(whole) > max_chars:
        tail = min(TAIL_CHARS, max_chars // 4)
        whole = f"{whole[: max_chars - tail]}…{whole[-tail:]} ({len(whole)} characters)"
    if whole.isprintable():
        return whole
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "backslashreplace").decode() for c in whole)


def reason(error: BaseException, max_chars: int = MAX_CHARS) -> str:
    """What an error says, on one line. Of a KeyError that is only the key: it is said to be missing."""
    if isinstance(error, KeyError) and error.args:
        return f"{short(error.args[0], max_chars)} is missing"
    text = " ".join(str(error).split()) or type(error).__name__
    return short(text, max_chars)


def without_password(url: str) -> str:
    """A URL as it may be shown: without a name and password in front of the host."""
    return re.sub(r"//[^/@]*@", "//…@", url)
