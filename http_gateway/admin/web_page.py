"""GET / and /page/…: a page for people, to talk with the model and to look at the server, with the network off.

The files need no key, for they say nothing of this server; the requests that the page makes are like those of any
client. A browser keeps the files and asks each time whether they have changed.
"""

import hashlib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.http.auth import Access
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind, RequestError

FOLDER = Path(__file__).parent / "page"
INDEX = "index.html"
MEDIA_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
OTHER_PAGES = {"docs.html"}  # which has a path of its own
# What the page may do: run and show its own files, and talk to its own server. A text that a model wrote can never
# become code: no scripts but files of this folder, and no string is taken as HTML (trusted types).
POLICY = {
    "default-src": "'none'",
    "script-src": "'self'",
    "style-src": "'self'",
    "img-src": "'self'",
    "connect-src": "'self'",
    "base-uri": "'none'",
    "form-action": "'none'",
    "frame-ancestors": "'none'",
    "require-trusted-types-for": "'script'",
    "trusted-types": "'none'",
}
HEADERS = {
    "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in POLICY.items()),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, and asked for again with its ETag
}


@dataclass(frozen=True)
class PageFile:
    """A file of the page, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def files() -> dict[str, PageFile]:
    """Every file of the page by its name, read once."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in MEDIA_TYPES and path.name not in OTHER_PAGES:
            content = path.read_bytes()
            etag = f'"{hashlib.sha256(content).hexdigest()[:32]}"'
            found[path.name] = PageFile(content, MEDIA_TYPES[path.suffix], etag)
    return found


def respond(http: HTTPRequest, file: PageFile) -> Response:
    """The file; 304 without it where the browser has it already."""
    headers = {**HEADERS, "ETag": file.etag}
    if file.etag in known_tags(http.headers.get("if-none-match", "")):
        return Response(status_code=304, headers=headers)
    return Response(file.content, headers=headers, media_type=file.media_type)


def known_tags(header: str) -> set[str]:
    """The tags in an If-None-Match header; a proxy that compresses makes weak ones of them."""
    return {tag.strip().removeprefix("W/") for tag in header.split(",")}


async def index(gateway: Gateway, http: HTTPRequest) -> Response:
    """The server's own page."""
    return respond(http, files()[INDEX])


async def page_file(gateway: Gateway, http: HTTPRequest) -> Response:
    """A file of the server's own page."""
    name = http.path_params["name"]
    if name == INDEX or name not in files():
        raise RequestError("Not Found", Kind.NOT_FOUND)
    return respond(http, files()[name])


ENDPOINTS = [
    Endpoint("/", index, ("GET", "HEAD"), access=Access.PUBLIC),
    Endpoint("/page/{name}", page_file, access=Access.PUBLIC),
]
