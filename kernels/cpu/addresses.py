"""When addresses that structures of C code keep are out of date.

Who moves what such a structure points to counts: weights, norms and biases, packed forms, pools. Who keeps addresses
asks for the last number before each use. Collecting all addresses to compare them would take longer than a short
product. Any thread may count: no number is given twice, so none looks like one that was seen before.
"""

from itertools import count

_numbers = count(1)
_last = 0


def moved() -> int:
    """Count a move; returns its number."""
    global _last
    _last = number = next(_numbers)
    return number


def moves() -> int:
    """The number of the last move."""
    return _last
