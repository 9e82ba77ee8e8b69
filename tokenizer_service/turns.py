"""Conversations for templates that know one system message, at the beginning, and turns that alternate.

Agents send instructions in between, and several messages of one role in a row. Many templates render that as it is, and
others refuse it. For those, the system messages at the beginning become one, later ones become messages of the user,
which do not move what stands in front of them, and neighbouring messages of the user become one.
"""

from itertools import takewhile
from typing import Any

Message = dict[str, Any]

BETWEEN = "\n\n"  # texts that become one message


def in_turns(messages: list[Message]) -> list[Message]:
    """The messages in such turns."""
    leading = len(list(takewhile(lambda message: message["role"] == "system", messages)))
    found: list[Message] = []
    for place, message in enumerate(messages):
        later = place >= leading and message["role"] == "system"
        turn = {**message, "role": "user"} if later else message
        if found and turn["role"] in ("system", "user") and found[-1]["role"] == turn["role"]:
            found[-1] = {**found[-1], "content": joined(found[-1]["content"], turn["content"])}
        else:
            found.append(turn)
    return found


def joined(first: Any, second: Any) -> Any:
    """Two contents as one: texts, or lists of parts where one of them is a list."""
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}{BETWEEN}{second}"
    return [*parts(first), *parts(second)]


def parts(content: Any) -> list[Any]:
    return content if isinstance(content, list) else [{"type": "text", "text": content}]
