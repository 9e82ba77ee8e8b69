"""Control endpoints: one route for every command that has a path, all from one generic handler.

A reply is answered as {"success", "message", …} unless RENDER says what the wire contract wants of it.
"""

import logging
from collections.abc import Callable
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import PlainTextResponse, Response

from http_gateway import errors
from http_gateway.auth import Access
from http_gateway.endpoint import Endpoint, Handler, read_body
from http_gateway.gateway import Gateway
from runtime import control
from runtime.control import (
    Abort,
    ControlCommand,
    DumpExpertDistributionRecord,
    FlushCache,
    StartExpertDistributionRecord,
    StopExpertDistributionRecord,
)
from runtime.errors import Kind, RequestError
from runtime.limits import MAX_ADMIN_BODY_BYTES
from runtime.messages import Message, Reply

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 600.0  # beyond the time-out that the command itself asks for

FLUSHED = (
    "Cache flushed.\nPlease check backend logs for more details. "
    "(When there are running or waiting requests, the operation will not be performed.)\n"
)


def flushed(reply: Reply) -> Response:
    if reply.success:
        return PlainTextResponse(FLUSHED)
    reason = f"{reply.message}\n" if reply.message else ""
    return PlainTextResponse(f"Flush cache failed.\n{reason}", 400)


def told(reply: Reply) -> Response:
    """The message alone, as text; a refusal as a native error."""
    if reply.success:
        return PlainTextResponse(reply.message)
    return errors.native(RequestError(reply.message, errors.KIND_OF_STATUS.get(reply.status, Kind.BAD_REQUEST)))


RENDER: dict[type[ControlCommand], Callable[[Reply], Response]] = {
    FlushCache: flushed,
    StartExpertDistributionRecord: told,
    StopExpertDistributionRecord: told,
    DumpExpertDistributionRecord: told,
}


def plain(reply: Reply) -> Response:
    body = {"success": reply.success, "message": reply.message, **(reply.body or {})}
    status = 400 if not reply.success and reply.status == 200 else reply.status
    return errors.json_response(body, status)


def command_handler(kind: type[ControlCommand]) -> Handler:
    """The handler of one command: decode, send round the ring, answer what comes back."""
    render = RENDER.get(kind, plain)

    async def handle(gateway: Gateway, http: HTTPRequest) -> Response:
        command = await read_command(kind, http)
        timeout_s = ANSWER_TIMEOUT_S + float(getattr(command, "timeout", None) or 0)
        try:
            reply = await gateway.ring.command(command, timeout_s)
        except TimeoutError:
            raise RequestError(f"No answer within {timeout_s:.0f} s.", Kind.INTERNAL) from None
        return answer(gateway, reply, render)

    return handle


def answer(gateway: Gateway, message: Message, render: Callable[[Reply], Response]) -> Response:
    if not isinstance(message, Reply):
        raise RequestError(f"The ring answered with {type(message).__name__}.", Kind.INTERNAL)
    if message.success and message.body:
        gateway.learn(message.body)
    return render(message)


async def read_command(kind: type[ControlCommand], http: HTTPRequest) -> ControlCommand:
    """The command of a body, with what the query string says laid over it."""
    command = control.from_body(kind, await read_body(http, MAX_ADMIN_BODY_BYTES))
    fields = {field.name: field.type for field in msgspec.structs.fields(kind)}
    for name, value in http.query_params.items():
        if name in fields:
            setattr(command, name, from_query(name, value, fields[name]))
    return command


def from_query(name: str, value: str, kind: Any) -> Any:
    try:
        return msgspec.convert(value, kind, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(f"{name}: {error}", field=name) from None


async def abort_request(gateway: Gateway, http: HTTPRequest) -> Response:
    """200 with an empty body, whether or not such a request is known."""
    command = await read_command(Abort, http)
    assert isinstance(command, Abort), command
    if not command.rid and not command.abort_all:
        log.warning("abort_request with neither a rid nor abort_all: nothing is aborted")
    found = gateway.ring.abort(command)
    log.info("abort_request: %d requests", found)
    return Response(status_code=200)


HANDLERS: dict[type[ControlCommand], Handler] = {Abort: abort_request}  # answered without a reply from the ring


def endpoint_of(path: str, kind: type[ControlCommand]) -> Endpoint:
    access = Access.ADMIN if kind.admin else Access.USER
    handler = HANDLERS.get(kind) or command_handler(kind)
    shape = errors.native if kind is Abort else errors.control
    return Endpoint(path, handler, kind.methods, access, shape, body=kind)


ENDPOINTS = [endpoint_of(path, kind) for path, kind in control.routes().items()]
