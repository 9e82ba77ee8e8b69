"""Renders the reply to a command in the shape that the command declares.

The handler in the scheduler writes the whole message: nothing is added here. A reply's body also carries state for the
gateway (`Gateway.learn`); a client sees only the fields that the shape names.
"""

from collections.abc import Mapping
from typing import Any

from starlette.responses import PlainTextResponse, Response

from quartet.http_gateway.http import errors
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Reply
from quartet.runtime.reply_shapes import AsAdapters, AsField, AsJson, AsNull, AsStatus, AsText


def render(command: ControlCommand, reply: Reply) -> Response:
    """The HTTP response to the client that sent the command."""
    match command.reply:
        case AsText(refusal_is_text=True):
            return PlainTextResponse(reply.message, status_of(reply))
        case AsText():
            return PlainTextResponse(reply.message) if reply.success else native_error(reply)
        case AsField(name):
            if not reply.success or reply.body is None:
                return errors.json_response({"error": {"message": reply.message}}, 400)
            return errors.json_response(reply.body[name])
        case AsNull() if reply.success:
            return errors.json_response(None)
        case AsStatus() if reply.success:
            return errors.json_response({"message": reply.message, "status": "ok"})
        case AsAdapters():
            return adapters_of(reply)
        case AsJson(fields=None):
            return success_and_message(reply, reply.body or {})
        case AsJson(fields=tuple() as fields, defaults=defaults):
            known = {**defaults, **(reply.body or {})}
            return success_and_message(reply, {name: known[name] for name in fields if name in known})
    return success_and_message(reply, {})


def success_and_message(reply: Reply, fields: Mapping[str, Any]) -> Response:
    return errors.json_response({"success": reply.success, "message": reply.message, **fields}, status_of(reply))


def adapters_of(reply: Reply) -> Response:
    """A refusal has its reason in `error_message`; a success has none there."""
    loaded = (reply.body or {}).get("loaded_adapters", {})
    error = "" if reply.success else reply.message
    content = {"success": reply.success, "error_message": error, "loaded_adapters": loaded}
    return errors.json_response(content, status_of(reply))


def native_error(reply: Reply) -> Response:
    return errors.native(RequestError(reply.message, errors.KIND_OF_STATUS.get(reply.status, Kind.BAD_REQUEST)))


def status_of(reply: Reply) -> int:
    return 400 if not reply.success and reply.status == 200 else reply.status
