"""A connection to a running server, its errors in one line, and the events of its streams."""

import contextlib
import ipaddress
import re
import ssl
import time
from urllib.parse import urlsplit

import httpx
import msgspec

from quartet.runtime.errors import UsageError
from quartet.runtime.shorten import without_password

CONNECT_S = 5.0
MAX_ERROR_CHARS = 300
MAX_ANSWER_BYTES = 16 << 20  # of an answer that is read whole, and of one event of a stream


class ClientError(Exception):
    """The server cannot be reached, or refused; `str(error)` says it in one line."""

    def __init__(self, message: str, status: int = 0) -> None:
        """`status`: of the HTTP answer; 0 without one."""
        super().__init__(message)
        self.status = status


class ErrorDetail(msgspec.Struct):
    message: str = ""


class ErrorBody(msgspec.Struct):
    """The shapes in which servers of this kind answer errors."""

    error: ErrorDetail | str | None = None
    message: str | None = None
    reason: str | None = None
    detail: msgspec.Raw = msgspec.Raw(b"")


class ModelCard(msgspec.Struct):
    id: str


class ModelList(msgspec.Struct):
    data: list[ModelCard]


def base_url(text: str) -> str:
    """The root of a server's API: `host:port`, with or without http:// and /v1. Raises UsageError."""
    with_scheme = text if re.match(r"[a-z][a-z0-9+.-]*://", text, re.IGNORECASE) else f"http://{text}"
    try:
        parts = urlsplit(with_scheme)
        usable = parts.scheme.lower() in ("http", "https") and parts.hostname and (parts.port or True)
    except ValueError:
        usable = False
    if usable and not parts.query and not parts.fragment:
        found = f"{parts.scheme}://{parts.netloc}{parts.path.rstrip('/').removesuffix('/v1')}"
        with contextlib.suppress(httpx.InvalidURL, UnicodeError):
            if httpx.URL(found).host and (parts.hostname or "").encode("idna"):  # each refuses other names of hosts
                return found
    raise UsageError(f"{without_password(text)!r} is no address of a server; it looks like http://127.0.0.1:30000")


def is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def client_options(url: str, api_key: str | None, read_timeout_s: float | None) -> dict[str, object]:
    """Arguments of an httpx client. No proxy stands between a program and its own machine.

    The certificates are the system's, or those of the variable SSL_CERT_FILE. A key that no header can carry is a
    UsageError.
    """
    if api_key is not None and not (api_key.isascii() and api_key.isprintable()):
        raise UsageError("the key has characters that no HTTP header can carry")
    return {
        "base_url": url,
        "headers": {"Accept-Encoding": "identity"} | ({"Authorization": f"Bearer {api_key}"} if api_key else {}),
        "timeout": httpx.Timeout(read_timeout_s, connect=CONNECT_S),
        "verify": ssl.create_default_context() if url.startswith("https:") else True,
        "trust_env": not is_loopback(url),
    }


def connect(url: str, api_key: str | None = None, read_timeout_s: float | None = None) -> httpx.Client:
    """A client of the server at `url`. A key that no header can carry is a UsageError."""
    return httpx.Client(**client_options(url, api_key, read_timeout_s))  # type: ignore[arg-type]


def read_answer(response: httpx.Response, deadline_s: float | None = None) -> bytes:
    """The body of an answer that is being streamed. Raises ClientError for one that is too long, or not here in time.

    `deadline_s`: on `time.monotonic`.
    """
    body = bytearray()
    for part in response.iter_bytes():
        body += part
        if len(body) > MAX_ANSWER_BYTES:
            raise ClientError(f"{response.url} answers with more than {MAX_ANSWER_BYTES} bytes")
        if deadline_s is not None and time.monotonic() > deadline_s:
            raise ClientError(f"{response.url} did not answer in time")
    return bytes(body)


def served_models(client: httpx.Client) -> list[str]:
    """The names of the models that the server answers to. Raises ClientError."""
    try:
        with client.stream("GET", "/v1/models") as answer:
            body = read_answer(answer)
        check(answer.status_code, body)
        return [card.id for card in msgspec.json.decode(body, type=ModelList).data]
    except httpx.HTTPError as error:
        raise unreachable(client.base_url, error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise ClientError(f"what answers at {client.base_url} is no server of language models") from error


def unreachable(url: object, error: Exception) -> ClientError:
    """What a failure of the transport means to a person."""
    shown = without_password(str(url).rstrip("/"))
    if "CERTIFICATE_VERIFY_FAILED" in str(error):
        return ClientError(f"the certificate of {shown} is not trusted; SSL_CERT_FILE names the file of its authority")
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        return ClientError(f"no server answers at {shown} ({error}); start one with `quartet serve`")
    if isinstance(error, httpx.TimeoutException):
        return ClientError(f"the server at {shown} did not answer in time")
    return ClientError(f"the connection to {shown} was lost ({type(error).__name__}: {error})")


def check(status: int, body: bytes) -> None:
    """Raise ClientError for an answer that is none."""
    if status < 400:
        return
    message = error_message(body) or f"HTTP {status}"
    if status in (401, 403):
        message = f"the server wants a key that it knows ({message}); give it with --api-key or QUARTET_API_KEY"
    raise ClientError(message, status)


def error_message(body: bytes) -> str:
    """The text of an error in any of the usual shapes, else the beginning of the body; one line."""
    try:
        found = msgspec.json.decode(body, type=ErrorBody)
    except (msgspec.DecodeError, UnicodeDecodeError):
        text = body.decode(errors="replace")
    else:
        detail = found.error.message if isinstance(found.error, ErrorDetail) else found.error
        text = detail or found.message or found.reason or bytes(found.detail).decode(errors="replace")
    return " ".join(text.split())[:MAX_ERROR_CHARS]
