"""When addresses that structures of C code keep are out of date.

Who moves what such a structure points to counts: weights, norms and biases, packed forms, pools. Who keeps addresses
asks for the count before each use. Collecting all addresses to compare them would take longer than a short product.
"""

_moves = 0


def moved() -> int:
    """Count a move; returns the new count, which no other move has."""
    global _moves
    _moves += 1
    return _moves


def moves() -> int:
    """How often something has moved so far."""
    return _moves
