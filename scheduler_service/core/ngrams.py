"""An index of n-grams: where the last tokens of a sequence occurred before in it, and what followed there.

Every run of `min_match` tokens is stored by the position where it ended last, and each position names the one before
it, so a token costs one entry, whatever `max_match` is. Few positions are compared, the latest first.
"""

from array import array

NOWHERE = -1
MAX_COMPARED = 16  # earlier occurrences that are compared
MAX_ENTERED = 4096  # tokens entered in one call, in about 3 ms: a long prompt must not delay a step
ID_BYTES = 4


class NGrams:
    """The index of one sequence, whose tokens only grow."""

    __slots__ = ("_before", "_latest", "max_match", "min_match")

    def __init__(self, min_match: int, max_match: int) -> None:
        """A match has at least `min_match` equal tokens; more are compared, up to `max_match`."""
        self.min_match = min_match
        self.max_match = max_match
        self._latest: dict[bytes, int] = {}  # a run of `min_match` tokens → the position where it ended last
        self._before = array("i", [NOWHERE]) * (
            min_match - 1
        )  # by position: where the run that ends there ended before

    def follow(self, ids: "array[int]") -> bool:
        """Enter the new tokens of the sequence, as many as one call may; returns whether all are entered now."""
        first, end = len(self._before), min(len(ids), len(self._before) + MAX_ENTERED)
        latest, before, width = self._latest, self._before, self.min_match * ID_BYTES
        runs = ids[first + 1 - self.min_match : end].tobytes()
        for position in range(first, end):
            start = (position - first) * ID_BYTES
            run = runs[start : start + width]
            before.append(latest.get(run, NOWHERE))
            latest[run] = position
        return end == len(ids)

    def continuation(self, ids: "array[int]", count: int) -> tuple[int, ...]:
        """`count` tokens that followed the longest match, the latest of equally long ones; () if there is none.

        All of `ids` must have been entered. Where the match is so near that too few tokens follow it, the text is
        taken to be periodic.
        """
        match = self._longest_match(ids)
        if match == NOWHERE or count < 1:
            return ()
        period = len(ids) - 1 - match
        followed = ids[match + 1 : match + 1 + count]
        return tuple((followed * -(-count // period))[:count])

    def _longest_match(self, ids: "array[int]") -> int:
        """The position where the longest run that also ends the sequence ended before, or NOWHERE."""
        best, length = NOWHERE, 0
        position = self._before[-1] if len(ids) >= self.min_match else NOWHERE
        for _ in range(MAX_COMPARED):
            if position == NOWHERE:
                break
            common = self._common(ids, position)
            if common > length:
                best, length = position, common
            if length == self.max_match:
                break
            position = self._before[position]
        return best

    def _common(self, ids: "array[int]", position: int) -> int:
        """How many tokens up to `position` equal the sequence's last ones; `min_match` are known to."""
        last = len(ids) - 1
        length, most = self.min_match, min(self.max_match, position + 1)
        while length < most and ids[position - length] == ids[last - length]:
            length += 1
        return length
