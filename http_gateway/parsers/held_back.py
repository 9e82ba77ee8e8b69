"""What a stream must hold back because the next piece may complete a tag."""


def held_back(text: str, start: int, *tags: str) -> int:
    """Length of the longest end of `text`, from `start` on, that is the beginning, and not the whole, of a tag."""
    longest = min(len(text) - start, max(len(tag) for tag in tags) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)
