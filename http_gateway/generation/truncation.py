"""Prompts that are cut rather than refused: the fields of several APIs that ask for it, read as one.

truncate                 true, or so many tokens (TEI, Jina, TGI); NONE, START or END (Cohere): what is cut off
truncate_prompt_tokens   so many tokens; -1: what the model can read (vLLM)
truncation_side          left or right: what is cut off; also as truncation_direction (TEI)
"""

from dataclasses import dataclass
from typing import Literal

import msgspec

from quartet.http_gateway.generation.intake import Rules
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Request

SIDES: dict[str, Literal["left", "right"]] = {"left": "left", "right": "right", "START": "left", "END": "right"}
NONE = "NONE"


class Truncating(msgspec.Struct, kw_only=True):
    """The fields. Without a side, a text to embed loses its end, and a prompt to continue its start."""

    truncate: bool | int | Literal["NONE", "START", "END"] | None = None
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] | None = None
    truncation_direction: Literal["Left", "Right", "left", "right"] | None = None


@dataclass(frozen=True, slots=True)
class Truncation:
    """At most so many tokens (0: what the model can read), and where the others are cut off."""

    tokens: int
    side: Literal["left", "right"]

    def apply(self, request: Request, rules: Rules) -> None:
        """Have a request's prompt cut. It keeps room for the output that is asked for."""
        room = 0 if request.task == "embed" else max(1, request.params.max_new_tokens or 1)
        longest = max(1, rules.longest_prompt - room)
        request.truncate = min(self.tokens or longest, longest)
        request.truncate_side = self.side


def read_truncation(body: Truncating, default_side: Literal["left", "right"]) -> Truncation | None:
    """What a body asks for; None where it asks for nothing. Raises RequestError."""
    tokens, field = body.truncate_prompt_tokens, "truncate_prompt_tokens"
    if tokens is None and isinstance(body.truncate, int) and not isinstance(body.truncate, bool):
        tokens, field = body.truncate, "truncate"
    if tokens is not None and tokens != -1 and tokens < 1:
        raise RequestError(f"{field} must be -1 or at least 1, got {tokens}.", field=field)
    if tokens is None and body.truncate in (None, False, NONE):
        return None
    side = body.truncation_side or (body.truncation_direction or "").lower() or body.truncate
    return Truncation(0 if tokens in (None, -1) else tokens or 0, SIDES.get(str(side), default_side))
