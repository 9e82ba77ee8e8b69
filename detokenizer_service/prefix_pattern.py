"""The prefixes of what a pattern matches, as a pattern of its own.

`prefix_pattern_of("ab+c")` matches "", "a", "ab", "abb", "abbc" ... Text that ends with such a prefix may still
become a match. The rules, with P for "prefixes of":

    P(x)  = x?                     a character, class or escape; "" for an assertion
    P(rs) = P(r) | r P(s)
    P(r|s) = P(r) | P(s)
    P(r*) = r* P(r)                likewise +; P(r{m,n}) = r{0,n-1} P(r); P(r?) = P(r)

The pattern must be valid RE2; it may match more than the prefixes (assertions are not followed into), never less.
"""

import re
from dataclasses import dataclass

QUOTED = re.compile(r"\\Q(.*?)(?:\\E|\Z)", re.DOTALL)
BAR = re.compile(r"\|")
CLOSE = re.compile(r"\)")
FLAGS = re.compile(r"\(\?[imsU-]+\)")
OPEN = re.compile(r"\((?:\?(?:P?<\w+>|([imsU-]*):))?")
REPEAT = re.compile(r"(?:([*+?])|\{(\d+)(?:(,)(\d*))?\})\??")
ASSERTION = re.compile(r"\\[AbBz]|[\^$]")
ATOM = re.compile(
    r"""
    \\ (?: [pP]\{[^}]*\} | x\{[^}]*\} | x[0-9A-Fa-f]{2} | [pP]. | [0-7]{1,3} | . )
    | \[ \^? \]? (?: \[:\^?\w+:\] | \\[pP]\{[^}]*\} | \\x\{[^}]*\} | \\. | [^\]\\] )* \]
    | .
    """,
    re.DOTALL | re.VERBOSE,
)


@dataclass(frozen=True, slots=True)
class Part:
    """A piece of a pattern and the pattern of its prefixes; both can stand in an alternation."""

    whole: str
    prefixes: str

    @property
    def grouped(self) -> str:
        return f"(?:{self.whole})"


def prefix_pattern_of(pattern: str) -> str:
    """A pattern for every prefix of a match, the empty one and the whole included."""
    return _Parser(pattern).alternation().prefixes


class _Parser:
    """Reads a pattern from left to right."""

    def __init__(self, pattern: str) -> None:
        self._pattern = pattern
        self._at = 0

    def alternation(self) -> Part:
        """Up to the end of the group. A flag set in a branch holds for the branches behind it."""
        branch, flags = self._sequence()
        branches = [branch]
        while self._take(BAR):
            branch, more_flags = self._sequence()
            branches.append(Part(branch.whole, f"{flags}(?:{branch.prefixes})"))
            flags += more_flags
        return Part("|".join(b.whole for b in branches), "|".join(b.prefixes for b in branches))

    def _sequence(self) -> tuple[Part, str]:
        parts, flags = [], ""
        while self._at < len(self._pattern) and self._pattern[self._at] not in "|)":
            if match := self._take(FLAGS):
                flags += match[0]
                parts.append(Part(match[0], ""))
            else:
                parts += self._item()
        prefixes = parts[-1].prefixes if parts else ""
        for part in reversed(parts[:-1]):
            prefixes = f"{part.prefixes}|{part.whole}(?:{prefixes})"
        return Part("".join(part.whole for part in parts), prefixes), flags

    def _item(self) -> list[Part]:
        """An atom, group or assertion with what repeats it; the characters of a quotation are one part each."""
        if match := self._take(QUOTED):
            parts = [_atom(re.escape(character)) for character in match[1]]
        elif match := self._take(ASSERTION):
            parts = [Part(match[0], "")]
        elif match := self._take(OPEN):
            parts = [self._group(match[1] or "")]
        else:
            match = self._take(ATOM)
            assert match is not None, (self._pattern, self._at)
            parts = [_atom(match[0])]
        if parts and (repeat := self._take(REPEAT)):
            parts[-1] = _repeated(parts[-1], repeat)
        return parts

    def _group(self, flags: str) -> Part:
        body = self.alternation()
        closed = self._take(CLOSE)
        assert closed is not None, (self._pattern, self._at)
        return Part(f"(?{flags}:{body.whole})", f"(?{flags}:{body.prefixes})")

    def _take(self, expression: "re.Pattern[str]") -> "re.Match[str] | None":
        match = expression.match(self._pattern, self._at)
        if match:
            self._at = match.end()
        return match


def _atom(source: str) -> Part:
    return Part(source, f"(?:{source})?")


def _repeated(part: Part, repeat: "re.Match[str]") -> Part:
    sign, least, comma, most = repeat.groups()
    whole = part.grouped + repeat[0]
    if sign == "?":
        return Part(whole, part.prefixes)
    if sign or (comma and not most):
        return Part(whole, f"{part.grouped}*(?:{part.prefixes})")
    times = int(most or least)
    return Part(whole, f"{part.grouped}{{0,{times - 1}}}(?:{part.prefixes})" if times else "")
