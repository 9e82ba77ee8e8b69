"""Splits a model's output into its thought and its answer, piece by piece as it streams.

The result does not depend on where the stream was cut. Blanks around the tags belong to nobody and are dropped.
"""

from dataclasses import dataclass
from typing import NamedTuple

from http_gateway.held_back import held_back
from runtime.errors import RequestError


@dataclass(frozen=True)
class Family:
    """How one family of models marks its thought."""

    opening: str = "<think>"
    closing: str = "</think>"
    starts_inside: bool = False  # the prompt ends inside the thought: no opening is generated


FAMILIES = {
    "deepseek-r1": Family(starts_inside=True),
    "deepseek-v3": Family(),
    "glm45": Family(),
    "kimi": Family("◁think▷", "◁/think▷"),
    "qwen3": Family(),
    "qwen3-thinking": Family(starts_inside=True),
    "step3": Family(starts_inside=True),
}


class Split(NamedTuple):
    """New characters of each part."""

    reasoning: str = ""
    content: str = ""


class ReasoningParser:
    """One output on its way: before the thought, inside it, or past it."""

    def __init__(self, family: Family) -> None:
        self._family = family
        self._buffer = ""
        self._read = self._before
        self._begun = False  # the current part has shown a character that is no blank

    @property
    def thinking(self) -> bool:
        """Inside the thought, or about to be."""
        return self._read == self._inside or (self._read == self._before and self._family.starts_inside)

    def feed(self, delta: str) -> Split:
        """Take the next characters; give those that are decided."""
        self._buffer += delta
        reasoning, content = "", ""
        while (split := self._read()) is not None:
            reasoning += split.reasoning
            content += split.content
        return Split(reasoning, content)

    def finish(self) -> Split:
        """The output is over: give what was held back."""
        rest, self._buffer = self._buffer, ""
        if self._read == self._inside:
            return Split(reasoning=rest.rstrip() if self._begun else rest.strip())
        if self._read == self._before and self._family.starts_inside:
            return Split(reasoning=rest.strip())
        return Split(content=rest)

    def _take(self, count: int) -> str:
        taken, self._buffer = self._buffer[:count], self._buffer[count:]
        return taken

    # Each state reads from the buffer and returns what it decided, or None when it needs more.

    def _before(self) -> Split | None:
        opening, text = self._family.opening, self._buffer.lstrip()
        if text.startswith(opening):
            self._buffer = text[len(opening) :]
            self._read = self._inside
            return Split()
        if opening.startswith(text):  # nothing yet, or a part of the tag
            return None
        self._read = self._inside if self._family.starts_inside else self._past
        self._begun = not self._family.starts_inside
        return Split()

    def _inside(self) -> Split | None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        before, tag, after = self._buffer.partition(self._family.closing)
        if tag:
            self._buffer, self._read, self._begun = after, self._past, False
            return Split(reasoning=before.rstrip())
        undecided = held_back(self._buffer, self._family.closing)
        decided = self._buffer[: len(self._buffer) - undecided].rstrip()
        self._begun = self._begun or bool(decided)
        return Split(reasoning=self._take(len(decided))) if decided else None

    def _past(self) -> Split | None:
        if not self._begun:
            self._buffer = self._buffer.lstrip()
        self._begun = self._begun or bool(self._buffer)
        return Split(content=self._take(len(self._buffer))) if self._buffer else None


def parser(name: str) -> ReasoningParser:
    """The parser of a family, by its `--reasoning-parser` name. Raises RequestError."""
    if name not in FAMILIES:
        raise RequestError(
            f"Unsupported reasoning parser {name!r}, use one of: {', '.join(FAMILIES)}.", field="reasoning_parser"
        )
    return ReasoningParser(FAMILIES[name])


def split(name: str, text: str) -> Split:
    """Thought and answer of a whole output."""
    reading = parser(name)
    first, last = reading.feed(text), reading.finish()
    return Split(first.reasoning + last.reasoning, first.content + last.content)
