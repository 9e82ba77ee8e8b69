"""How many states a pattern has once its counted repetitions are written out; too many are refused.

The engine limits its own work, except where it unrolls a counted repetition. So that is computed here first.
"""

import re

from quartet.runtime import limits

PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|[*+?]|.", re.DOTALL)


def check_regex(text: str) -> None:
    """Raise ValueError for a pattern whose counted repetitions unroll to too many states."""
    size = RegexSize()
    for piece in PIECES.finditer(text):
        match piece[0][0]:
            case "(":
                size.open()
            case ")":
                size.close()
            case "{" if piece[1]:
                size.repeat(int(piece[2] or piece[1]))
            case "[" if len(piece[0]) == 1:  # end here: for each further one, PIECES would search the rest of the text
                raise ValueError("a character set is not closed")
            case "*" | "+" | "?" | "|":
                pass
            case _:
                size.atom(1)
    size.total()


class RegexSize:
    """Adds up the states of an expression, piece by piece from left to right. Raises ValueError for too many."""

    def __init__(self) -> None:
        self._groups = [0]  # states of each open group, without its last element
        self._last = [0]  # states of the last element of each open group

    def atom(self, states: int) -> None:
        self._groups[-1] += self._last[-1]
        self._last[-1] = states

    def open(self) -> None:
        self._groups.append(0)
        self._last.append(0)

    def close(self) -> None:
        if len(self._groups) == 1:
            raise ValueError("a closing parenthesis has no opening one")
        self.atom_of_group(self._groups.pop() + self._last.pop())

    def atom_of_group(self, states: int) -> None:
        self.atom(max(states, 1))

    def repeat(self, times: int) -> None:
        self._last[-1] *= max(times, 1)
        if self._last[-1] > limits.MAX_GRAMMAR_STATES:
            raise ValueError(f"repetitions unroll to more than {limits.MAX_GRAMMAR_STATES} states")

    def total(self) -> int:
        states = sum(self._groups) + sum(self._last)
        if states > limits.MAX_GRAMMAR_STATES:
            raise ValueError(f"repetitions unroll to more than {limits.MAX_GRAMMAR_STATES} states")
        return states
