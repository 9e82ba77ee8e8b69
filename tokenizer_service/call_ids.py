"""Ids of tool calls for templates that insist on nine letters and digits, as Mistral's do.

A conversation may come from anywhere, so an id that does not fit is made into one that does: the same for the call and
for its result.
"""

import hashlib
import re
import string
from typing import Any

INSISTS = re.compile(r"\bid\b['\"\]\s]*\|\s*length\s*!=\s*9\b|tool_call_id['\"\]\s]*\|\s*length\s*!=\s*9\b")
FITS = re.compile(r"[a-zA-Z0-9]{9}")
CHARS = string.ascii_letters + string.digits
LENGTH = 9

Message = dict[str, Any]


def insists(template: str) -> bool:
    """Whether a template's source refuses ids of any other length."""
    return INSISTS.search(template) is not None


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
