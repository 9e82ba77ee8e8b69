"""Tags in text that streams: where they are, and what must be held back because the next piece may complete one."""

import re
from functools import lru_cache

BLANKS = re.compile(r"\s+")


def held_back(text: str, start: int, *tags: str) -> int:
    """Length of the longest end of `text`, from `start` on, that is the beginning, and not the whole, of a tag."""
    longest = min(len(text) - start, max(len(tag) for tag in tags) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)


def blanks_end(text: str, at: int) -> int | None:
    """Where the blanks that begin at `at` end; None where there are none."""
    match = BLANKS.match(text, at)
    return match.end() if match else None


@lru_cache
def pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the first of these tags."""
    return re.compile("|".join(map(re.escape, tags)))


def starts(text: str, at: int, ended: bool, *tags: str) -> str | None:
    """The first tag, in their order, that begins at `at`; "" where none does.

    None where more text must tell, unless it has `ended`: whether it is one of them at all, or an earlier, longer one.
    """
    rest = text[at : at + max(map(len, tags), default=0)]
    for tag in filter(None, tags):
        if rest.startswith(tag):
            return tag
        if not ended and tag.startswith(rest):
            return None
    return ""
