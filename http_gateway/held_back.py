"""What a stream must hold back because the next piece may complete a tag, or show that a blank was not wanted."""


def held_back(text: str, *tags: str) -> int:
    """Length of the longest end of `text` that is the beginning, and not the whole, of a tag."""
    longest = min(len(text), max(len(tag) for tag in tags) - 1)
    return next((n for n in range(longest, 0, -1) if any(tag.startswith(text[-n:]) for tag in tags)), 0)
