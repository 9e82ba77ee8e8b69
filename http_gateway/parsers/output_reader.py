"""Reads a model's output, piece by piece as it streams: thought, content, tool calls.

One state machine for every format, in one pass: a state takes text from where it stands and says where it stopped.
What it must see again, with what follows, is never longer than a tag, so the work is linear in the output however
it is cut; and the events of a whole output, joined, do not depend on where it was cut.

What is no well-formed call of a known tool stays text, to the last character; blanks beside a call belong to nobody
and are dropped. Once a call's name and the opening of its arguments are read it is announced, and what follows
streams through as it comes. What looks like a call in a thought is a part of the thought, closed or not. A thought may
begin where the output begins, behind a thought and behind a call.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import lru_cache
from types import MappingProxyType
from typing import Any

from quartet.http_gateway.parsers.call_formats import CallFormat, Head
from quartet.http_gateway.parsers.held_back import held_back
from quartet.http_gateway.parsers.json_calls import JsonCall
from quartet.http_gateway.parsers.pythonic_calls import PythonCall
from quartet.http_gateway.parsers.tagged_calls import TaggedCall, Tags
from quartet.http_gateway.parsers.thoughts import Marks
from quartet.http_gateway.parsers.tool_events import CALL, Event, Events
from quartet.runtime.messages import Place

BLANKS = re.compile(r"\s+")
NAMED_CHARS = re.compile(r"[\w.\-\[\]]+")
NAMED = re.compile(r"([\w.-]+?)(?:\[CALL_ID\]\w+)?(?:\[ARGS\])?")
MAX_NAMED_CHARS = 256
MAX_HEAD_CHARS = 512
NO_SCHEMAS: Mapping[str, Any] = MappingProxyType({})

State = Callable[[str, int], int]


class OutputReader:
    """Reads one output. A state that neither moves nor gives way to another needs more text."""

    def __init__(
        self,
        marks: Marks | None = None,
        place: Place = "before",
        calls: CallFormat | None = None,
        known: Iterable[str] = (),
        schemas: Mapping[str, Any] = NO_SCHEMAS,
    ) -> None:
        """`schemas`: of the parameters, by the tool's name. `place`: where the output begins.

        No `marks`: no thought is looked for. No `calls`: none are looked for.
        """
        self._marks = marks
        self._calls = calls
        self._known = frozenset(known)
        self._schemas = schemas
        self._events = Events()
        self._thinking = self._may_think = False
        self._held = ""  # of the text before; shorter than a tag
        self._again = ""  # text that must be read again
        self._ended = False
        self._lead: list[str] = []  # what led to the call that is being read: text, if it turns out to be none
        self._in_array = False
        self._wrapped = False
        self._separated = False  # a separator stands behind the last call
        self._name: list[str] = []
        self._name_chars = 0
        self._call: JsonCall | PythonCall | TaggedCall | None = None
        self._state: State = self._beginning
        self.begin(place)

    def begin(self, place: Place) -> None:
        """Say where the output begins, before anything is read."""
        assert self._state == self._beginning and not self._held
        self._thinking = self._marks is not None and place == "inside"
        self._may_think = self._marks is not None and place != "past"
        if self._thinking:
            self._events.tag()

    @property
    def thinking(self) -> bool:
        """Inside the thought, or about to be."""
        return self._thinking

    def feed(self, text: str) -> list[Event]:
        """Take the next characters; give the events they decide."""
        self._run(text)
        return self._events.take()

    def finish(self) -> list[Event]:
        """The output is over: give what was held back."""
        self._ended = True
        self._run("")
        while self._lead or self._call:
            self._give_up()
            again, self._again = self._again, ""
            self._run(again)
        self._events.finish(keep_blanks=not self._thinking)
        return self._events.take()

    def _run(self, text: str) -> None:
        text, self._held = self._held + text, ""
        at = 0
        while at < len(text):
            state, before = self._state, at
            at = state(text, at)
            if self._again:
                text, self._again, at = self._again + text[at:], "", 0
            elif at == before and self._state == state:
                self._held = text[at:]
                return

    def _text(self, text: str) -> None:
        if self._thinking:
            self._events.thought(text)
        else:
            self._events.content(text, hold=self._calls is not None or self._state == self._beginning)

    def _starts(self, text: str, at: int, *tags: str) -> str | None:
        """The first tag that begins at `at`, "" where none does, None where more text must tell."""
        for tag in tags:
            if tag and text.startswith(tag, at):
                return tag
        rest = text[at : at + max(map(len, tags), default=0)]
        return None if not self._ended and any(tag.startswith(rest) for tag in tags if tag) else ""

    # Text.

    def _beginning(self, text: str, at: int) -> int:
        """Of the output, or of what stands behind a thought or a call: blanks, a thought, a bare call, or text."""
        if solid := blanks_end(text, at):
            self._text(text[at:solid])
            return solid
        opening = self._marks.opening if self._marks and self._may_think else ""
        found = self._starts(text, at, opening, *self._bare_beginnings())
        if found is None:
            return at
        if not found:
            self._state = self._in_text
            self._may_think = False
            return at
        if found == opening:
            return self._open_thought(at + len(opening))
        prefix = found[:-1]
        return self._lead_to_call(prefix, at + len(prefix))

    def _bare_beginnings(self) -> tuple[str, ...]:
        if self._calls is None or self._thinking or self._events.calls:
            return ()
        return tuple(prefix + bracket for prefix in self._calls.bare for bracket in self._calls.brackets)

    def _in_text(self, text: str, at: int) -> int:
        """Thought or content, up to the next tag."""
        tags = self._tags()
        found = pattern(tags).search(text, at) if tags else None
        if found is None:
            end = len(text) - (held_back(text, at, *tags) if tags and not self._ended else 0)
            self._text(text[at:end])
            return end
        self._text(text[at : found.start()])
        if self._thinking:
            return self._close_thought(found.end())
        return self._lead_to_call(found[0], found.end())

    def _tags(self) -> tuple[str, ...]:
        """What ends the text: in a thought nothing but its closing."""
        if self._marks and self._thinking:
            return (self._marks.closing,)
        return self._calls.openings if self._calls else ()

    def _open_thought(self, at: int) -> int:
        self._events.tag()
        self._lead, self._thinking, self._may_think, self._state = [], True, False, self._in_text
        return at

    def _close_thought(self, at: int) -> int:
        self._events.tag()
        self._thinking, self._may_think, self._state = False, True, self._beginning
        return at

    # What leads to a call.

    def _lead_to_call(self, lead: str, at: int) -> int:
        """A call should follow."""
        self._lead.append(lead)
        self._in_array = self._separated = self._wrapped = False
        self._state = self._head
        return at

    def _head(self, text: str, at: int) -> int:
        """Blanks, the bracket of an array, then a call."""
        assert self._calls is not None
        if solid := blanks_end(text, at):
            self._lead.append(text[at:solid])
            return solid
        if self._calls.tags is not None:
            return self._read(self._tagged_call(self._calls, self._calls.tags), at)
        if self._calls.head is not None:
            self._state = self._framed
            return at
        character = text[at]
        if character == "[" and not self._in_array:
            self._lead.append(character)
            self._in_array = True
            return at + 1
        if self._calls.body == "python":
            return self._python_head(text, at)
        if character == "{":
            return self._read(JsonCall(self._known, self._events, self._calls.closing), at)
        if self._calls.named and not self._in_array and NAMED_CHARS.match(text, at):
            self._name, self._name_chars, self._state = [], 0, self._named
            return at
        return self._no_call(at)

    def _tagged_call(self, calls: CallFormat, tags: Tags) -> TaggedCall:
        begun = self._lead == [tags.name_begin]  # the beginning of the call itself stood for the tag before it
        return TaggedCall(self._known, self._events, tags, calls.closing, self._schemas, begun)

    def _python_head(self, text: str, at: int) -> int:
        """A call in a list or on a line; there it may stand in the parentheses of a `print`."""
        assert self._calls is not None
        if not self._in_array and not self._calls.lines:
            return self._no_call(at)
        wrapper = "" if self._wrapped else self._starts(text, at, self._calls.wrapper)
        if wrapper is None:
            return at
        if not wrapper:
            return self._read(PythonCall(self._known, self._events), at)
        self._lead.append(wrapper)
        self._wrapped = True
        return at + len(wrapper)

    def _framed(self, text: str, at: int) -> int:
        """What stands before arguments that stand alone; it is short enough to be looked at as a whole."""
        assert self._calls is not None and self._calls.head is not None
        head = self._calls.head
        match = head_pattern(head).match(text, at)
        if match is not None:
            if match[1] not in self._known:
                return self._no_call(at)
            self._lead.append(match[0])
            return self._read(JsonCall(self._known, self._events, head.end, match[1]), match.end())
        short = len(text) - at <= MAX_HEAD_CHARS
        begin = head.begin.removesuffix(head.optional)
        return at if short and begin.startswith(text[at : at + len(begin)]) else self._no_call(at)

    def _named(self, text: str, at: int) -> int:
        """A name, and marks behind it, before arguments that stand alone."""
        assert self._calls is not None
        if text[at] == "{":
            name = NAMED.fullmatch("".join(self._name))
            if name is None or name[1] not in self._known:
                return self._no_call(at)
            return self._read(JsonCall(self._known, self._events, self._calls.closing, name[1]), at)
        if solid := blanks_end(text, at):
            self._lead.append(text[at:solid])
            self._name_chars = MAX_NAMED_CHARS  # the name is over
            return solid
        match = NAMED_CHARS.match(text, at)
        if match is None or self._name_chars + len(match[0]) > MAX_NAMED_CHARS:
            return self._no_call(at)
        self._lead.append(match[0])
        self._name.append(match[0])
        self._name_chars += len(match[0])
        return match.end()

    # Calls.

    def _read(self, call: JsonCall | PythonCall | TaggedCall, at: int) -> int:
        self._call, self._state = call, self._in_call
        return at

    def _in_call(self, text: str, at: int) -> int:
        call = self._call
        assert call is not None
        at = call.take(text, at)
        unread = call.unread if isinstance(call, TaggedCall) else ""
        if call.outcome == CALL:
            self._again = unread
            self._lead, self._call, self._state = [], None, self._between
            self._separated = False
        elif call.outcome is not None:
            self._lead += call.raw
            self._no_call(at)
            self._again = unread
        return at

    def _no_call(self, at: int) -> int:
        """What led here is text."""
        text = "".join(self._lead)
        self._lead, self._call, self._state = [], None, self._in_text
        self._text(text)
        return at

    def _between(self, text: str, at: int) -> int:
        """Behind a call: blanks, a separator, the next call, the end of the array, the closing tag, or text."""
        calls = self._calls
        assert calls is not None
        if solid := blanks_end(text, at):
            self._lead.append(text[at:solid])
            return solid
        if text[at] == ")" and self._wrapped:
            self._lead, self._wrapped = [], False
            return at + 1
        if text[at] in calls.separators and not self._separated:
            self._lead.append(text[at])
            self._separated = True
            return at + 1
        if self._next_call(text[at]):
            self._state = self._head
            return at
        if text[at] == "]" and self._in_array and not self._separated:
            self._lead, self._in_array, self._state = [], False, self._behind_array
            return at + 1
        return self._behind_array(text, at)

    def _next_call(self, character: str) -> bool:
        """May a call begin with this character, right here?"""
        assert self._calls is not None
        if self._calls.tags is not None or self._calls.head is not None:
            return False
        if self._calls.body == "python":
            return self._separated or (self._calls.lines and not self._in_array and character.isidentifier())
        return character == "{" and (self._separated or bool(self._calls.closing))

    def _behind_array(self, text: str, at: int) -> int:
        """The closing tag, the opening of the next call or of a thought, or text."""
        calls = self._calls
        assert calls is not None
        if solid := blanks_end(text, at):
            self._lead.append(text[at:solid])
            return solid
        head = calls.head
        inner = calls.tags.name_begin if calls.tags else head.begin.removesuffix(head.optional) if head else ""
        end = head.end if head else ""
        thought = self._marks.opening if self._marks else ""
        closing = "" if self._separated else calls.closing
        found = self._starts(text, at, closing, inner, *calls.openings, end, thought)
        if found is None:
            return at
        if not found:
            return self._no_call(at)
        if found == end:
            self._lead = []
            return at + len(end)
        if found == inner:
            self._state = self._head
            return at
        if found in calls.openings:
            return self._lead_to_call(found, at + len(found))
        if found == thought:
            return self._open_thought(at + len(found))
        self._lead, self._may_think, self._state = [], True, self._beginning
        return at + len(found)

    def _give_up(self) -> None:
        """The output ends before it is known whether a call was meant, or amid the arguments of one."""
        if self._call is not None:
            self._lead += self._call.raw
        if isinstance(self._call, TaggedCall) and self._call.announced:
            self._call.flush()
        if (self._call is not None and self._call.announced) or (self._calls and self._calls.alone):
            self._lead, self._call, self._state = [], None, self._in_text
        else:
            self._no_call(0)


def blanks_end(text: str, at: int) -> int | None:
    """Where the blanks that begin at `at` end; None where there are none."""
    match = BLANKS.match(text, at)
    return match.end() if match else None


@lru_cache
def pattern(tags: tuple[str, ...]) -> re.Pattern[str]:
    """What finds the first of these tags."""
    return re.compile("|".join(map(re.escape, tags)))


@lru_cache
def head_pattern(head: Head) -> re.Pattern[str]:
    """What finds a call's head; a number behind the name counts the calls."""
    return re.compile(
        rf"{re.escape(head.begin.removesuffix(head.optional))}(?:{re.escape(head.optional)})?\s*"
        rf"([\w.\-]{{1,{MAX_NAMED_CHARS}}}?)(?::\d+)?\s*{re.escape(head.name_end)}\s*(?={{)"
    )
