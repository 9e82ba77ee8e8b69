"""Reads a model's output, piece by piece as it streams: thought, content, tool calls.

One state machine for every format, in one pass: a state takes text from where it stands and says where it stopped.
What it must see again, with what follows, is never longer than a tag, so the work is linear in the output however
it is cut; and the events of a whole output, joined, do not depend on where it was cut.

What is no well-formed call of a known tool stays text, to the last character; blanks beside a call belong to nobody
and are dropped. Once a call's name and the opening of its arguments are read it is announced, and what follows
streams through as it comes. What looks like a call in a thought is a part of the thought, closed or not, unless calls
end the thoughts of the family (`Marks.call_ends`). A thought may begin where the output begins, behind a thought and
behind a call. Where an output is a row of messages with heads, the heads say what each is, and only its end ends it.
"""

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

from quartet.http_gateway.parsers.call_formats import CallFormat
from quartet.http_gateway.parsers.calls_reader import CallsReader, State
from quartet.http_gateway.parsers.channels import read_head
from quartet.http_gateway.parsers.tag_search import blanks_end, held_back, pattern, starts
from quartet.http_gateway.parsers.thoughts import Marks
from quartet.http_gateway.parsers.tool_events import Event, Events
from quartet.runtime.messages import Place

NO_SCHEMAS: Mapping[str, Any] = MappingProxyType({})


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
        self._events = Events()
        self._channels = (marks and marks.channels) or (calls and calls.channels) or None
        self._in_message = False  # behind its head, before its end
        self._as_written = False  # with its head and its end: nobody here is addressed
        self._thinking = self._may_think = False
        self._held = ""  # of the text before; shorter than a tag
        self._again = ""  # text that must be read again
        self.cut = False  # the output has ended amid the arguments of a call
        self._ended = False
        self._calls_before = 0  # the one that is being read
        self._fresh = True  # nothing but blanks was read
        thought = marks.opening if marks else ""
        self._reading = CallsReader(calls, self._known, schemas, self._events, thought) if calls else None
        self._state: State = self._beginning
        self.begin(place)

    def begin(self, place: Place) -> None:
        """Say where the output begins, before anything is read."""
        assert self._state == self._beginning and not self._held
        self._thinking = self._marks is not None and place == "inside"
        self._may_think = self._marks is not None and place != "past"
        self._in_message = self._thinking
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
        if self._reading:
            self._reading.ended = True
        if self._cut_before_call():
            self._held = ""
        self._run("")
        while self._reading and self._state == self._in_calls:
            self.cut = self._reading.give_up() or self.cut
            again = self._leave_calls(self._reading) + self._again
            self._again = ""
            self._run(again)
        self._events.finish(keep_blanks=not self._thinking)
        return self._events.take()

    def _cut_before_call(self) -> bool:
        """Whether what is held back is the beginning of a call, where there is nothing but calls."""
        if self._calls is None or not self._calls.alone or self._thinking:
            return False
        return self._state == self._in_calls or self._calls.begins_tag(self._held.strip())

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
            self._events.content(text, hold=self._tags() != () or self._state == self._beginning)

    # Text.

    def _beginning(self, text: str, at: int) -> int:
        """Of the output, or of what stands behind a thought or a call: blanks, a thought, a bare call, or text."""
        if solid := blanks_end(text, at):
            self._text(text[at:solid])
            return solid
        heads = self._heads(self._fresh)
        opening = self._marks.opening if self._marks and self._may_think and not self._channels else ""
        found = starts(text, at, self._ended, opening, *heads, *self._bare_beginnings())
        if found is None:
            return at
        self._fresh = False
        if not found or found in heads:
            self._state = self._message_head if found else self._in_text
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
        if self._channels and found[0] in self._channels.ends:
            return self._end_message(found[0], found.end())
        if found[0] in self._heads():
            self._state = self._message_head
            return found.start()
        if self._thinking and self._marks and found[0] == self._marks.closing:
            return self._close_thought(found.end())
        if self._marks and found[0] == self._marks.opening:
            return self._open_thought(found.end())
        return self._lead_to_call(found[0], found.end())

    def _tags(self) -> tuple[str, ...]:
        """What ends the text: in a thought its closing, and a call in some families."""
        if self._channels and self._thinking:
            return self._channels.ends
        if self._marks and self._thinking:
            return (self._marks.closing, *(self._calls.openings if self._calls and self._marks.call_ends else ()))
        messages = (*self._heads(), *self._channels.ends) if self._channels else ()
        thoughts = (self._marks.opening,) if self._marks and self._marks.anywhere else ()
        return (*messages, *thoughts, *(self._calls.openings if self._calls else ()))

    def _open_thought(self, at: int) -> int:
        self._events.tag()
        self._thinking, self._may_think, self._state = True, False, self._in_text
        return at

    def _close_thought(self, at: int) -> int:
        self._events.tag()
        self._thinking, self._may_think, self._state = False, True, self._beginning
        return at

    # Calls.

    def _lead_to_call(self, lead: str, at: int) -> int:
        """A call should follow."""
        assert self._reading is not None
        self._calls_before = self._events.calls
        self._reading.lead_to_call(lead)
        self._state = self._in_calls
        return at

    def _in_calls(self, text: str, at: int) -> int:
        reading = self._reading
        assert reading is not None
        at = reading.take(text, at)
        lead = self._leave_calls(reading) if reading.outcome is not None else ""
        self._again, reading.again = lead + reading.again, ""
        return at

    def _leave_calls(self, reading: CallsReader) -> str:
        """Go on with text. What led to no call is text; returns the part of it that must be read again."""
        lead, again = "".join(reading.lead), ""
        if self._thinking and self._events.calls > self._calls_before:
            self._thinking = False
        self._state = self._in_text
        self._as_written = bool(lead and self._calls and self._calls.channels)
        if self._thinking and self._marks:  # the thought may be closed in what looked like a call
            cut = lead.find(self._marks.closing)
            cut = len(lead) - held_back(lead, 0, self._marks.closing) if cut < 0 else cut
            lead, again = lead[:cut], lead[cut:]
        if lead:
            self._text(lead)
        if reading.outcome == "thought":
            self._open_thought(0)
        elif reading.outcome == "closed":
            self._may_think, self._state = True, self._beginning
        return again

    # Messages with heads, where the format has such.

    def _heads(self, fresh: bool = False) -> tuple[str, ...]:
        """What may begin the head of a message here. `fresh`: at the beginning of the output."""
        if self._channels is None or self._in_message:
            return ()
        return (*self._channels.heads, self._channels.recipient) if fresh else self._channels.heads

    def _message_head(self, text: str, at: int) -> int:
        """The head of a message, up to its text."""
        assert self._channels is not None
        head = read_head(text, at)
        if head is None and not self._ended:
            return at
        self._state = self._in_text
        if head is None or head.end == 0:
            tag = starts(text, at, self._ended, *self._channels.heads, self._channels.recipient) or text[at]
            self._text(tag)
            return at + len(tag)
        self._in_message = True
        function = head.recipient.removeprefix(self._channels.namespace)
        if self._reading and self._calls and self._calls.channels and function in self._known:
            self._reading.lead_to_call(text[at : head.end], function)
            self._state = self._in_calls
        elif head.recipient or (head.channel == self._channels.thought and not self._marks):
            self._as_written = True
            self._text(text[at : head.end])
        else:
            self._events.message()
            self._thinking = head.channel == self._channels.thought
            self._state = self._in_text if self._thinking else self._beginning
        return head.end

    def _end_message(self, tag: str, at: int) -> int:
        if self._as_written:
            self._text(tag)
        else:
            self._events.tag()
        self._in_message = self._as_written = self._thinking = False
        return at
