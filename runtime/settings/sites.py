"""Names of hosts and origins as browsers and clients spell them, and the two flags that list some.

An origin is `scheme://host[:port]`, or `null` where a browser tells none. Names are compared in lower case, without
the dot of the root, and addresses by their value.
"""

import ipaddress
import re
from typing import NamedTuple

from quartet.runtime.errors import UsageError

ANY = "*"
AUTHORITY = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^\[\]:/?#@,\s\\]+))(?::(\d{0,5}))?")
ORIGIN = re.compile(r"([a-z][a-z0-9+.-]*)://([^/]*)")
DEFAULT_PORTS = {"http": 80, "https": 443}


class Authority(NamedTuple):
    """Host and port of a URL or of a Host header."""

    host: str  # lower case; an address in its shortest form, without brackets
    port: int | None = None


class Origin(NamedTuple):
    scheme: str
    authority: Authority


def authority(text: str) -> Authority | None:
    """What `host`, `host:port` or `[address]:port` names; None where it is none of them."""
    found = AUTHORITY.fullmatch(text.strip().lower())
    if found is None:
        return None
    address, name, port = found.groups()
    host = canonical(address or name)
    return None if not host or (address and ":" not in host) else Authority(host, int(port) if port else None)


def canonical(host: str) -> str:
    host = host.removesuffix(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return "" if ":" in host else host


def origin(text: str) -> Origin | None:
    """The parts of an origin; None for `null` and for what is no origin."""
    found = ORIGIN.fullmatch(text.strip().lower())
    named = authority(found[2]) if found else None
    return Origin(found[1], named) if found and named else None


def is_address(host: str) -> bool:
    """Whether a canonical host is an address, rather than a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Whether a name or address always means this machine."""
    host = canonical(host.lower())
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")
    mapped = getattr(address, "ipv4_mapped", None)
    return address.is_loopback or (mapped is not None and mapped.is_loopback)


def listed(text: str | None) -> list[str]:
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def allowed_origins(text: str | None) -> frozenset[Origin | str]:
    """Those of --cors-allow-origins: origins, and `*` and `null` as they are. Raises UsageError."""
    found: set[Origin | str] = set()
    for part in listed(text):
        parsed = part if part in (ANY, "null") else origin(part.removesuffix("/"))
        if parsed is None or (isinstance(parsed, Origin) and ANY in parsed.authority.host):
            raise UsageError(f"--cors-allow-origins takes *, null or scheme://host[:port], not {part!r}")
        found.add(parsed if isinstance(parsed, str) else with_port(parsed))
    return frozenset(found)


def allowed_hosts(text: str | None) -> frozenset[str]:
    """Those of --allowed-hosts: names and addresses without their ports, and `*` as it is. Raises UsageError."""
    found = set()
    for part in listed(text):
        address = f"[{part}]" if part.count(":") > 1 and not part.startswith("[") else part
        parsed = Authority(ANY) if part == ANY else authority(address)
        if parsed is None or (ANY in parsed.host and part != ANY):
            raise UsageError(f"--allowed-hosts takes *, or names and addresses of hosts, not {part!r}")
        found.add(parsed.host)
    return frozenset(found)


def with_port(parsed: Origin) -> Origin:
    """The origin with its port said, as two spellings of one are equal."""
    port = parsed.authority.port or DEFAULT_PORTS.get(parsed.scheme)
    return Origin(parsed.scheme, Authority(parsed.authority.host, port))
