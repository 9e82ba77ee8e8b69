"""How long a client wants a file to be kept: `expires_after` of OpenAI's API, in a form and in JSON."""

import msgspec
from starlette.datastructures import FormData

from quartet.runtime.errors import RequestError
from quartet.runtime.shorten import short

ANCHOR, SECONDS = FORM_FIELDS = ("expires_after[anchor]", "expires_after[seconds]")
CREATED = "created_at"
LEAST_S, MOST_S = 3600, 30 * 86400


class ExpiresAfter(msgspec.Struct):
    """Seconds from when a file is made."""

    anchor: str
    seconds: int


def wanted_s(form: FormData) -> int | None:
    """The seconds that a form asks for; None where it says nothing of it. Raises RequestError."""
    if not any(name in form for name in FORM_FIELDS):
        return None
    text = str(form.get(SECONDS))
    seconds = int(text) if text.isascii() and text.isdecimal() and len(text) < 9 else text
    check(str(form.get(ANCHOR)), seconds, FORM_FIELDS)
    return int(seconds)


def check(anchor: str, seconds: int | str, fields: tuple[str, str]) -> None:
    """Raise RequestError for what OpenAI's API refuses. `fields`: the names of both."""
    if anchor != CREATED:
        raise RequestError(f"{fields[0]} must be {CREATED!r}, got {short(anchor)!r}.", field=fields[0])
    if isinstance(seconds, str) or not LEAST_S <= seconds <= MOST_S:
        raise RequestError(f"{fields[1]} must be from {LEAST_S} to {MOST_S}, got {short(seconds)}.", field=fields[1])
