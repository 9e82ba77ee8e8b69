"""Conversations for templates that know one system message, at the beginning, and turns that alternate.

Agents send instructions in between, and several messages of one role in a row. Many templates render that as it is, and
others refuse it. For those, the system messages at the beginning become one, later ones become messages of the user,
which do not move what stands in front of them, and neighbouring messages of the user become one.
"""

from collections.abc import Sequence
from itertools import groupby, takewhile
from operator import itemgetter
from typing import Any

Message = dict[str, Any]

BETWEEN = "\n\n"  # texts that become one message


def in_turns(messages: list[Message]) -> list[Message]:
    """The messages in such turns."""
    leading = len(list(takewhile(lambda message: message["role"] == "system", messages)))
    later = [{**message, "role": "user"} if message["role"] == "system" else message for message in messages[leading:]]
    found: list[Message] = []
    for role, neighbours in groupby([*messages[:leading], *later], itemgetter("role")):
        run = list(neighbours)
        found += [as_one(run)] if role in ("system", "user") else run
    return found


def as_one(messages: Sequence[Message]) -> Message:
    """Messages of one role as one. A field in which they differ, a name for example, says nothing about the whole."""
    first, *others = messages
    if not others:
        return first
    same = {name: value for name, value in first.items() if all(other.get(name) == value for other in others)}
    return {**same, "content": joined([message["content"] for message in messages])}


def joined(contents: Sequence[Any]) -> Any:
    """Contents as one: a text, or a list of parts where one of them is a list."""
    if all(isinstance(content, str) for content in contents):
        return BETWEEN.join(contents)
    return [part for content in contents for part in parts(content)]


def parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]
