"""Who may call what: each route says which access it needs, and a key is compared without telling anything by time.

no key set           everything is open
--api-key            opens the user's routes, and the admin's where no admin key is set
--admin-api-key      opens the admin's routes and nothing else
"""

import hashlib
import hmac
from collections.abc import Sequence
from enum import Enum

HeaderList = Sequence[tuple[bytes, bytes]]


class Access(Enum):
    PUBLIC = "anyone"  # probes of orchestrators
    USER = "user key"
    ADMIN = "admin key, or the user's where there is none"


def digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Keys:
    """The server's keys, kept as digests."""

    def __init__(self, user: str | None, admin: str | None) -> None:
        self._user = digest(user.encode()) if user else None
        self._admin = digest(admin.encode()) if admin else None

    def allow(self, access: Access, headers: HeaderList) -> bool:
        """Does the request carry the key that this access needs? Works on the raw bytes of the headers."""
        if access is Access.PUBLIC:
            return True
        needed = self._user if access is Access.USER else self._admin or self._user
        return needed is None or hmac.compare_digest(digest(bearer(headers)), needed)


def bearer(headers: HeaderList) -> bytes:
    """The token of the one Authorization header; empty, which no key is, in every other case."""
    given = [value for name, value in headers if name == b"authorization"]
    if len(given) != 1:
        return b""
    scheme, _, token = given[0].partition(b" ")
    return token.strip() if scheme.lower() == b"bearer" else b""
