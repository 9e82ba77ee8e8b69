"""Where the last tokens of a sequence occurred before in it, and what followed there.

Every run of `shortest` tokens is remembered by where it ended last, and each such place names the one before, so a
token costs one entry, whatever the window. Only a bounded number of places is looked at, the latest first.
"""

from array import array

NOWHERE = -1
PLACES = 16  # earlier occurrences that are compared
AT_ONCE = 4096  # tokens entered in one call, in about 3 ms: a long prompt must not hold up a step
ID_BYTES = 4


class NGrams:
    """The index of one sequence, whose tokens only grow."""

    __slots__ = ("_before", "_latest", "longest", "shortest")

    def __init__(self, shortest: int, longest: int) -> None:
        """Runs of at least `shortest` tokens count as found; how much more is equal is compared up to `longest`."""
        self.shortest = shortest
        self.longest = longest
        self._latest: dict[bytes, int] = {}  # a run of `shortest` tokens → the position where it ended last
        self._before = array("i", [NOWHERE]) * (shortest - 1)  # by position: where the run that ends there ended before

    def follow(self, ids: "array[int]") -> bool:
        """Enter what is new of a sequence; whether all of it is."""
        first, end = len(self._before), min(len(ids), len(self._before) + AT_ONCE)
        latest, before, width = self._latest, self._before, self.shortest * ID_BYTES
        runs = ids[first + 1 - self.shortest : end].tobytes()
        for position in range(first, end):
            start = (position - first) * ID_BYTES
            run = runs[start : start + width]
            before.append(latest.get(run, NOWHERE))
            latest[run] = position
        return end == len(ids)

    def continuation(self, ids: "array[int]", count: int) -> tuple[int, ...]:
        """`count` tokens that followed the longest run found, the latest of equally long ones; () if there is none.

        All of `ids` has been entered. Where the earlier run is so near that what followed it is not enough, the text
        is taken to be periodic.
        """
        place = self._longest_match(ids)
        if place == NOWHERE or count < 1:
            return ()
        period = len(ids) - 1 - place
        followed = ids[place + 1 : place + 1 + count]
        return tuple((followed * -(-count // period))[:count])

    def _longest_match(self, ids: "array[int]") -> int:
        """Where the longest run that ends the sequence too ended before."""
        best, length = NOWHERE, 0
        place = self._before[-1] if len(ids) >= self.shortest else NOWHERE
        for _ in range(PLACES):
            if place == NOWHERE:
                break
            common = self._common(ids, place)
            if common > length:
                best, length = place, common
            if length == self.longest:
                break
            place = self._before[place]
        return best

    def _common(self, ids: "array[int]", place: int) -> int:
        """How many tokens up to `place` are the sequence's last ones; `shortest` are known to be."""
        last = len(ids) - 1
        length, most = self.shortest, min(self.longest, place + 1)
        while length < most and ids[place - length] == ids[last - length]:
            length += 1
        return length
