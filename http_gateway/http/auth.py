"""Who may call what: each route says which access it needs, and a key is compared without telling anything by time.

no key set           everything is open
--api-key            opens the user's routes, and the admin's where no admin key is set
--admin-api-key      opens the admin's routes and nothing else

A key is sent as a bearer token or, by clients of Anthropic's API, in x-api-key. Where both are sent, one must be right.
"""

import hashlib
import hmac
from collections.abc import Sequence
from enum import Enum
from itertools import product

from quartet.runtime.settings import keys

HeaderList = Sequence[tuple[bytes, bytes]]

SENT_AS = "sent as `Authorization: Bearer <key>` or `x-api-key: <key>`"
BEARER, API_KEY = b"authorization", b"x-api-key"  # headers


class Access(Enum):
    PUBLIC = "anyone"  # probes of orchestrators
    USER = "user key"
    ADMIN = "admin key, or the user's where there is none"


def key_digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def digests(setting: str | None, flag: str) -> list[bytes]:
    """Of each key as clients may encode it: most send UTF-8, some libraries Latin-1. Raises UsageError."""
    found = []
    for key in [] if setting is None else keys.split(setting, flag):
        found.append(key_digest(key.encode()))
        if not key.isascii() and (latin := key.encode("latin-1", "ignore")).decode("latin-1") == key:
            found.append(key_digest(latin))
    return found


class Keys:
    """The server's keys, kept as digests."""

    def __init__(self, user: str | None, admin: str | None) -> None:
        self._user = digests(user, "--api-key")
        self._admin = digests(admin, "--admin-api-key")

    def allow(self, access: Access, headers: HeaderList) -> bool:
        """Does the request carry a key that opens this access? Works on the raw bytes of the headers."""
        if access is Access.PUBLIC:
            return True
        accepted = self._user if access is Access.USER else self._admin or self._user
        given = [key_digest(bearer(headers)), key_digest(single(headers, API_KEY))]
        pairs = product(given, accepted)
        matches = sum(hmac.compare_digest(one, other) for one, other in pairs)  # all are compared, whichever matches
        return matches > 0 or not accepted

    def required_key(self, access: Access, headers: HeaderList) -> str:
        """Which key a refused request should have carried, and what it has instead, for people."""
        if access is Access.ADMIN and self._admin:
            other = "; the ordinary key does not open it" if self._user else ""
            return f"This path needs the admin key (--admin-api-key), {SENT_AS}{other}. {found_instead(headers)}"
        other = "; the admin key does not open it" if self._admin else ""
        return f"This path needs the server's key (--api-key), {SENT_AS}{other}. {found_instead(headers)}"


def found_instead(headers: HeaderList) -> str:
    """What a refused request has in place of the right key; the key itself is not repeated."""
    if bearer(headers) or single(headers, API_KEY):
        return "The request has another key."
    if any(name in (BEARER, API_KEY) and value for name, value in headers):
        return "The request has such a header twice, or one of another form."
    return "The request has no key."


def bearer(headers: HeaderList) -> bytes:
    """The token of the one Authorization header; empty, which no key is, in every other case."""
    scheme, _, token = single(headers, BEARER).partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""


def single(headers: HeaderList, name: bytes) -> bytes:
    """The value of a header that is there once; empty otherwise."""
    given = [value for known, value in headers if known == name]
    return given[0] if len(given) == 1 else b""
