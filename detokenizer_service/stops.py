"""Stop strings and patterns in a growing text: found across token borders, held back while they may come, cut.

The match that starts first in the text wins; of several that start there, the one named first. Text is held back as
long as it may be the prefix of a match, and no longer. What is held back is searched again with every token, so a
match longer than MAX_STOP_SPAN_CHARS may be missed; one of large patterns, which cost more to search for, earlier.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from quartet.detokenizer_service.prefix_pattern import prefix_pattern_of
from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.sampling import SamplingParams
from quartet.runtime.stop_patterns import compile_stop


@dataclass(frozen=True, slots=True)
class Match:
    """Where a stop begins and ends in a text, and what the client called it."""

    start: int
    end: int
    name: str


class Stops:
    """The compiled stop conditions of a request, without state: all requests that have the same share them."""

    def __init__(self, strings: tuple[str, ...], patterns: tuple[str, ...]) -> None:
        self._strings = strings
        self._prefixes = frozenset(string[:end] for string in strings for end in range(1, len(string)))
        self._firsts = tuple({string[0] for string in strings if len(string) > 1})
        self._reach = max((len(string) for string in strings), default=1) - 1  # the longest prefix
        self._patterns = [(compile_stop(pattern), pattern) for pattern in patterns]
        self._tails = [_tail(pattern) for pattern in patterns]
        program = sum(compiled.programsize for compiled in [*self._tails, *(found for found, _ in self._patterns)])
        self._span = min(limits.MAX_STOP_SPAN_CHARS, limits.MAX_STOP_SEARCH // max(program, 1))

    def search(self, text: str, start: int, ends_behind: int = 0) -> Match | None:
        """The first match at or behind `start` that ends behind `ends_behind`."""
        found = []
        for string in self._strings:
            at = text.find(string, max(start, ends_behind - len(string) + 1))
            if at >= 0:
                found.append(Match(at, at + len(string), string))
        for compiled, pattern in self._patterns:
            match = compiled.search(text, start)
            if match and match.end() <= ends_behind:
                match = next((later for later in compiled.finditer(text, start) if later.end() > ends_behind), None)
            if match:
                found.append(Match(match.start(), match.end(), pattern))
        return min(found, key=lambda match: match.start, default=None)

    def held_from(self, text: str, start: int) -> int:
        """The first place at or behind `start` from which the text may be the prefix of a match."""
        places: list[int] = [self._string_from(text, start)]
        places += [tail.search(text, start).start() for tail in self._tails]
        latest: int = len(text) - max(self._span, self._reach)
        return max(min(places), latest)

    def _string_from(self, text: str, start: int) -> int:
        for at in range(max(start, len(text) - self._reach), len(text)):
            if text[at] in self._firsts and text[at:] in self._prefixes:
                return at
        return len(text)


def _tail(pattern: str) -> Any:
    """Matches, in every text, the longest tail that may become a match of `pattern`."""
    try:
        return compile_stop(rf"(?:{prefix_pattern_of(pattern)})\z", 2 * limits.MAX_STOP_REGEX_MEMORY)
    except RequestError:  # still too large: anything may become a match
        return compile_stop(r"(?s).*\z")


@lru_cache(maxsize=64)
def _shared(strings: tuple[str, ...], patterns: tuple[str, ...]) -> Stops:
    return Stops(strings, patterns)


def stops_of(params: SamplingParams) -> Stops | None:
    """What ends a request's text, or None. Raises RequestError for a bad pattern (the tokenizer has checked them)."""
    strings, patterns = tuple(params.stop_strings), tuple(params.stop_patterns)
    return _shared(strings, patterns) if strings or patterns else None


class Cutter:
    """Lets the text of one request pass up to its first stop."""

    def __init__(self, stops: Stops, trim: bool) -> None:
        """`trim`: the stop itself does not pass."""
        self._stops = stops
        self._trim = trim
        self._text = ""  # the last character that passed (patterns may look at it), then what is held back
        self._passed = 0
        self._spared = 0  # a stop that is complete before this place ends nothing

    def feed(self, text: str, spared: bool = False) -> tuple[str, Match | None]:
        """What may pass of the text so far, and the stop that ends it. `spared`: no stop may be completed here."""
        self._text += text
        if spared:
            self._spared = len(self._text)
            return self._pass_up_to(self._stops.held_from(self._text, self._passed)), None
        match = self._stops.search(self._text, self._passed, self._spared)
        if match:
            return self._text[self._passed : match.start if self._trim else match.end], match
        return self._pass_up_to(self._stops.held_from(self._text, self._passed)), None

    def flush(self) -> str:
        """What is held back, now that the text is over."""
        return self._pass_up_to(len(self._text))

    def _pass_up_to(self, end: int) -> str:
        passing = self._text[self._passed : end]
        context = max(end - 1, 0)
        self._text, self._passed = self._text[context:], end - context
        self._spared = max(self._spared - context, 0)
        return passing
