"""Which web pages may call the server, and under which names it answers.

A browser sends requests on behalf of every page that its user visits. So a request that changes something and comes
from a page must come from this server's own, from one of this machine, or from one that --cors-allow-origins names.
A page whose own host name is made to lead here (DNS rebinding) would count as the server's own: where the server
listens on loopback only, or --allowed-hosts says so, requests must name a host that is known.
Clients that are no browsers send no Origin and are not concerned.
"""

from collections.abc import Callable
from typing import Any

from starlette.datastructures import MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from quartet.http_gateway.http import errors
from quartet.http_gateway.http.auth import HeaderList
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.settings import sites

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
EXPOSED = ("Retry-After", "Request-Id", "X-Request-Id", "Warning")  # headers of answers that scripts of pages may read
ANY_ADDRESS = frozenset({"0.0.0.0", "::"})  # as a name they lead to this machine


def values(headers: HeaderList, name: bytes) -> list[str]:
    return [value.decode("latin-1").strip() for known, value in headers if known == name]


class AllowedSites:
    """The origins whose pages may call a server, and the hosts by which it is known."""

    def __init__(self, config: ServerConfig) -> None:
        self._origins = sites.allowed_origins(config.cors_allow_origins)
        hosts = sites.allowed_hosts(config.allowed_hosts)
        local = sites.is_loopback(config.listen_address or config.host)
        self.checks_hosts = sites.ANY not in hosts and bool(local or hosts)
        self._any_address = not local  # probes of an orchestrator name no other, and no page has one for its name
        self._hosts = hosts | {sites.canonical(config.host.lower())} | ANY_ADDRESS

    @property
    def any_origin(self) -> bool:
        return sites.ANY in self._origins

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may call the server."""
        if self.any_origin or origin in self._origins:
            return True
        parsed = sites.origin(origin)
        if parsed is None:
            return False
        local = parsed.scheme in sites.DEFAULT_PORTS and sites.is_loopback(parsed.authority.host)
        return local or sites.with_port(parsed) in self._origins

    def foreign_page(self, headers: HeaderList) -> str:
        """The origin of the page that sent a request, for an error message; empty where the request is allowed."""
        given, relation = values(headers, b"origin"), [site.lower() for site in values(headers, b"sec-fetch-site")]
        if self.any_origin or (given and all(map(self.allows_origin, given))):
            return ""
        if "cross-site" in relation:
            return (given and given[0]) or "another site"
        if not given or (relation and relation[0] in ("same-origin", "none")):  # a proxy may have changed the Host
            return ""
        hosts = values(headers, b"host")
        own = len(given) == len(hosts) == 1 and same_origin(given[0], hosts[0])
        return "" if own else given[0] or "no origin"

    def host_refusal(self, headers: HeaderList, http_version: str) -> tuple[int, str]:
        """Status and reason where the Host header is refused; (0, "") where it is right."""
        hosts = values(headers, b"host")
        if len(hosts) > 1:
            return 400, "The request has several Host headers."
        if not hosts:
            return (0, "") if http_version == "1.0" else (400, "The request has no Host header.")
        if not self.checks_hosts:
            return 0, ""
        named = sites.authority(hosts[0])
        if named is None:
            return 400, "The Host header is not host[:port]."
        if named.host in self._hosts or sites.is_loopback(named.host):
            return 0, ""
        if self._any_address and sites.is_address(named.host):
            return 0, ""
        return 403, f"The host {named.host} is not known here; start the server with --allowed-hosts {named.host}"


def same_origin(origin: str, host: str) -> bool:
    """Whether a page of this origin was served under this Host header; the scheme is the proxy's business."""
    page, named = sites.origin(origin), sites.authority(host)
    if page is None or named is None or page.authority.host != named.host:
        return False
    default = sites.DEFAULT_PORTS.get(page.scheme)
    return (page.authority.port or default) == (named.port or default)


def forbidden(reason: str, status: int = 403) -> ASGIApp:
    return errors.json_response(
        errors.flat(reason, "BadRequestError" if status == 400 else "ForbiddenError", status), status
    )


def of_foreign_page(page: str) -> RequestError:
    """What is wrong with a request that a foreign page sent."""
    return RequestError(
        f"A request from a page of {page} may change nothing here; "
        "start the server with --cors-allow-origins and that origin, if the page is to be trusted",
        Kind.FORBIDDEN,
    )


def refusal(page: str) -> ASGIApp:
    """The answer to such a request."""
    return forbidden(of_foreign_page(page).message)


class HostMiddleware:
    """Lets requests pass that name a host by which the server is known."""

    def __init__(
        self, app: ASGIApp, allowed_sites: AllowedSites, own_shape: Callable[[Scope], errors.Shape | None]
    ) -> None:
        """`own_shape`: of the errors of a request, where its API has one."""
        self._app = app
        self._allowed_sites = allowed_sites
        self._own_shape = own_shape

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        status, reason = 0, ""
        if scope["type"] == "http":
            status, reason = self._allowed_sites.host_refusal(scope["headers"], scope["http_version"])
        await (self._refusal(scope, status, reason) if status else self._app)(scope, receive, send)

    def _refusal(self, scope: Scope, status: int, reason: str) -> ASGIApp:
        own = self._own_shape(scope)
        return own(RequestError(reason, errors.KIND_OF_STATUS[status])) if own else forbidden(reason, status)


class CorsMiddleware(CORSMiddleware):
    """The headers by which a browser lets a trusted page read answers; credentials do not go with `*`."""

    def __init__(self, app: ASGIApp, allowed_sites: AllowedSites) -> None:
        super().__init__(
            app,
            allow_origins=[sites.ANY] if allowed_sites.any_origin else [],
            allow_methods=["*"],
            allow_headers=["*"],
            expose_headers=EXPOSED,
            allow_credentials=not allowed_sites.any_origin,
            allow_private_network=True,
        )
        self._allowed_sites = allowed_sites

    def is_allowed_origin(self, origin: str) -> bool:
        return self._allowed_sites.allows_origin(origin)

    async def send(self, message: Message, send: Send, request_headers: Any) -> None:
        """Send an answer, with CORS headers only for an allowed origin."""
        origin = request_headers.get("origin")
        if origin is None or self.is_allowed_origin(origin):
            await super().send(message, send, request_headers)
            return
        if message["type"] == "http.response.start":
            message.setdefault("headers", [])
            MutableHeaders(scope=message).add_vary_header("Origin")
        await send(message)
