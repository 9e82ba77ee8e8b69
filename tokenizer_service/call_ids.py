"""Ids of tool calls for templates that want a certain kind of them.

Mistral's insist on nine letters and digits. Kimi K2's print the id in place of the function's name, and the model has
learned `functions.NAME:NUMBER`. A conversation may come from anywhere, so an id that does not fit is made into one that
does: the same for the call and for its result.
"""

import hashlib
import re
import string
from typing import Any

INSISTS = re.compile(r"\bid\b['\"\]\s]*\|\s*length\s*!=\s*9\b|tool_call_id['\"\]\s]*\|\s*length\s*!=\s*9\b")
FITS = re.compile(r"[a-zA-Z0-9]{9}")
NAMES = re.compile(r"<\|tool_call_begin\|>")
PRINTS = re.compile(r"\btool_call(\.id\b|\[['\"]id['\"]\])")
NAMED = re.compile(r"functions\.[\w.\-]+:\d+")
CHARS = string.ascii_letters + string.digits
LENGTH = 9

Message = dict[str, Any]


def insists(template: str) -> bool:
    """Whether a template's source refuses ids of any other length."""
    return INSISTS.search(template) is not None


def fit(messages: list[Message], template: str) -> list[Message]:
    """The messages with ids as the template wants them."""
    if insists(template):
        return [fitted(message) for message in messages]
    if NAMES.search(template) and PRINTS.search(template):
        return named(messages)
    return messages


def named(messages: list[Message]) -> list[Message]:
    """The messages with ids `functions.NAME:NUMBER`, which count the calls of the conversation."""
    made: dict[str, str] = {}
    number = 0
    changed = []
    for message in messages:
        if isinstance(calls := message.get("tool_calls"), list):
            message = {**message, "tool_calls": [_named_call(call, number + n, made) for n, call in enumerate(calls)]}
            number += len(calls)
        result_of = message.get("tool_call_id")
        if isinstance(result_of, str) and result_of in made:
            message = {**message, "tool_call_id": made[result_of]}
        changed.append(message)
    return changed


def _named_call(call: Any, number: int, made: dict[str, str]) -> Any:
    """`made`: takes the id, under the one that the client sent."""
    function = call.get("function") if isinstance(call, dict) else None
    name = function.get("name") if isinstance(function, dict) else None
    sent = call.get("id") if isinstance(call, dict) else None
    if not isinstance(name, str) or (isinstance(sent, str) and NAMED.fullmatch(sent)):
        return call
    identity = f"functions.{name}:{number}"
    if isinstance(sent, str):
        made[sent] = identity
    return {**call, "id": identity}


def fitted(message: Message) -> Message:
    """The message with ids that fit."""
    if isinstance(message.get("tool_call_id"), str):
        message = {**message, "tool_call_id": short(message["tool_call_id"])}
    if isinstance(message.get("tool_calls"), list):
        message = {**message, "tool_calls": [_fitted_call(call) for call in message["tool_calls"]]}
    return message


def _fitted_call(call: Any) -> Any:
    return {**call, "id": short(call["id"])} if isinstance(call, dict) and isinstance(call.get("id"), str) else call


def short(identity: str) -> str:
    """The id itself where it fits, else one made from it."""
    if FITS.fullmatch(identity):
        return identity
    number = int.from_bytes(hashlib.sha256(identity.encode("utf-8", "replace")).digest())
    made = []
    for _ in range(LENGTH):
        number, digit = divmod(number, len(CHARS))
        made.append(CHARS[digit])
    return "".join(made)
