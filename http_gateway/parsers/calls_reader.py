"""Reads tool calls in a model's output, from what leads to the first one to what stands behind the last one."""

import re
from collections.abc import Callable, Collection, Mapping
from functools import lru_cache
from typing import Any, Literal

from quartet.http_gateway.parsers.call_formats import CallFormat, Head
from quartet.http_gateway.parsers.json_calls import JsonCall
from quartet.http_gateway.parsers.pythonic_calls import PythonCall
from quartet.http_gateway.parsers.tag_search import blanks_end, starts
from quartet.http_gateway.parsers.tagged_calls import TaggedCall, Tags
from quartet.http_gateway.parsers.tool_events import CALL, Events

NAMED_CHARS = re.compile(r"[\w.\-\[\]]+")
NAMED = re.compile(r"([\w.-]+?)(?:\[CALL_ID\](\w+))?(?:\[ARGS\])?")
MAX_NAMED_CHARS = 256
MAX_HEAD_CHARS = 512

State = Callable[[str, int], int]


class CallsReader:
    """Reads the calls that stand together, again and again: each time `lead_to_call`, then `take` until an `outcome`.

    A state that neither moves nor gives way to another needs more text.
    """

    def __init__(
        self, calls: CallFormat, known: Collection[str], schemas: Mapping[str, Any], events: Events, thought: str
    ) -> None:
        """`schemas`: of the parameters, by the tool's name. `thought`: the tag of one, which may follow a call."""
        self.outcome: Literal["text", "closed", "thought"] | None = None  # what follows; closed: behind the closing tag
        self.lead: list[str] = []  # what led to the call that is being read: text, if it turns out to be none
        self.again = ""  # text that must be read again
        self.ended = False  # no more text will come
        self._calls = calls
        self._known = known
        self._schemas = schemas
        self._events = events
        self._thought = thought
        self._in_array = False
        self._wrapped = False
        self._separated = False  # a separator stands behind the last call
        self._name: list[str] = []
        self._name_chars = 0
        self._call: JsonCall | PythonCall | TaggedCall | None = None
        self._state: State = self._head

    def lead_to_call(self, lead: str, function: str | None = None) -> None:
        """A call should follow. `function`: the one to which a message is addressed, whose arguments follow."""
        self.outcome, self.lead = None, [lead]
        self._in_array = self._separated = self._wrapped = False
        self._name = [] if function is None else [function]
        self._state = self._head if function is None else self._message

    def take(self, text: str, at: int) -> int:
        """Read on from `at`; where what follows is not of the calls, or more text is needed, or some again."""
        moved = True
        while moved and at < len(text) and self.outcome is None and not self.again:
            state, before = self._state, at
            at = state(text, at)
            moved = at != before or self._state != state
        return at

    def give_up(self) -> bool:
        """The output ends before it is known whether a call was meant, or amid the arguments of one: then True."""
        announced = self._call is not None and self._call.announced
        if self._call is not None:
            self.lead += self._call.raw
        if isinstance(self._call, TaggedCall) and self._call.announced:
            self._call.flush()
        if announced or self._calls.alone:
            self.lead = []
        self._no_call(0)
        return announced

    def _starts(self, text: str, at: int, *tags: str) -> str | None:
        return starts(text, at, self.ended, *tags)

    def _message(self, text: str, at: int) -> int:
        """The arguments of a call, or the end of one that has none."""
        assert self._calls.channels is not None
        if solid := blanks_end(text, at):
            self.lead.append(text[at:solid])
            return solid
        found = self._starts(text, at, "{", *self._calls.channels.ends)
        if found == "{":
            return self._read(JsonCall(self._known, self._events, self._calls.channels.ends[0], self._name[0]), at)
        if found:
            self._events.start(self._name[0])
            self._events.arguments("{}")
            self.lead = []
        return at if found is None else self._no_call(at)

    def _head(self, text: str, at: int) -> int:
        """Blanks, the bracket of an array, then a call."""
        if solid := blanks_end(text, at):
            self.lead.append(text[at:solid])
            return solid
        if self._calls.tags is not None:
            return self._read(self._tagged_call(self._calls, self._calls.tags), at)
        if self._calls.head is not None:
            self._state = self._framed
            return at
        character = text[at]
        if character == "[" and not self._in_array:
            self.lead.append(character)
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
        begun = self.lead == [tags.name_begin]  # the beginning of the call itself stood for the tag before it
        return TaggedCall(self._known, self._events, tags, calls.closing, self._schemas, begun)

    def _python_head(self, text: str, at: int) -> int:
        """A call in a list or on a line; there it may stand in the parentheses of a `print`."""
        if not self._in_array and not self._calls.lines:
            return self._no_call(at)
        name = self._calls.wrapper
        wrapper = "" if self._wrapped or not name else self._starts(text, at, f"{name}(")
        if wrapper is None:
            return at
        if not wrapper:
            return self._read(PythonCall(self._known, self._events), at)
        self.lead.append(wrapper)
        self._wrapped = True
        return at + len(wrapper)

    def _framed(self, text: str, at: int) -> int:
        """What stands before arguments that stand alone; it is short enough to be looked at as a whole."""
        assert self._calls.head is not None
        head = self._calls.head
        match = head_pattern(head).match(text, at)
        if match is not None:
            if match[1] not in self._known:
                return self._no_call(at)
            self.lead.append(match[0])
            return self._read(JsonCall(self._known, self._events, head.end, match[1]), match.end())
        short = len(text) - at <= MAX_HEAD_CHARS
        begin = head.begin.removesuffix(head.optional)
        return at if short and begin.startswith(text[at : at + len(begin)]) else self._no_call(at)

    def _named(self, text: str, at: int) -> int:
        """A name, and marks behind it, before arguments that stand alone."""
        if text[at] == "{":
            name = NAMED.fullmatch("".join(self._name))
            if name is None or name[1] not in self._known:
                return self._no_call(at)
            self._events.next_id = name[2]
            return self._read(JsonCall(self._known, self._events, self._calls.closing, name[1]), at)
        if solid := blanks_end(text, at):
            self.lead.append(text[at:solid])
            self._name_chars = MAX_NAMED_CHARS  # the name is over
            return solid
        match = NAMED_CHARS.match(text, at)
        if match is None or self._name_chars + len(match[0]) > MAX_NAMED_CHARS:
            return self._no_call(at)
        self.lead.append(match[0])
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
            self.again = unread
            self.lead, self._call, self._separated = [], None, False
            self._state = self._between
            if self._calls.channels is not None:
                self.outcome = "text"
        elif call.outcome is not None:
            self.lead += call.raw
            self._no_call(at)
            self.again = unread
        return at

    def _no_call(self, at: int) -> int:
        """What led here is text."""
        self._call, self.outcome, self._events.next_id = None, "text", None
        return at

    def _between(self, text: str, at: int) -> int:
        """Behind a call: blanks, a separator, the next call, the end of the array, the closing tag, or text."""
        calls = self._calls
        if solid := blanks_end(text, at):
            self.lead.append(text[at:solid])
            return solid
        if text[at] == ")" and self._wrapped:
            self.lead, self._wrapped = [], False
            return at + 1
        if text[at] in calls.separators and not self._separated:
            self.lead.append(text[at])
            self._separated = True
            return at + 1
        if self._next_call(text[at]):
            self._state = self._head
            return at
        if text[at] == "]" and self._in_array and not self._separated:
            self.lead, self._in_array, self._state = [], False, self._behind_array
            return at + 1
        return self._behind_array(text, at)

    def _next_call(self, character: str) -> bool:
        """May a call begin with this character, right here?"""
        if self._calls.tags is not None or self._calls.head is not None:
            return False
        if self._calls.body == "python":
            return self._separated or (self._calls.lines and not self._in_array and character.isidentifier())
        return character == "{" and (self._separated or bool(self._calls.closing))

    def _behind_array(self, text: str, at: int) -> int:
        """The closing tag, the opening of the next call or of a thought, or text."""
        calls = self._calls
        if solid := blanks_end(text, at):
            self.lead.append(text[at:solid])
            return solid
        head = calls.head
        inner = calls.tags.name_begin if calls.tags else head.begin.removesuffix(head.optional) if head else ""
        end = head.end if head else ""
        closing = "" if self._separated else calls.closing
        found = self._starts(text, at, closing, inner, *calls.openings, end, self._thought)
        if found is None:
            return at
        if not found:
            return self._no_call(at)
        if found == end:
            self.lead = []
            return at + len(end)
        if found == inner:
            self._state = self._head
            return at
        if found in calls.openings:
            self.lead_to_call("".join(self.lead) + found)
        else:
            self.lead, self.outcome = [], "thought" if found == self._thought else "closed"
        return at + len(found)


@lru_cache
def head_pattern(head: Head) -> re.Pattern[str]:
    """What finds a call's head; a number behind the name counts the calls."""
    return re.compile(
        rf"{re.escape(head.begin.removesuffix(head.optional))}(?:{re.escape(head.optional)})?\s*"
        rf"([\w.\-]{{1,{MAX_NAMED_CHARS}}}?)(?::\d+)?\s*{re.escape(head.name_end)}\s*(?={{)"
    )
