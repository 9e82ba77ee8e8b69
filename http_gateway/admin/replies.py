"""What a client sees of a command's Reply: {"success", "message", …}, unless RENDER has what the wire contract wants.

A sentence that a client reads has one owner, the handler that carries the command out: nothing is put before or behind
it here. A reply's body also tells the gateway itself something (`Gateway.learn`); only what is named here is shown.
"""

from collections.abc import Callable
from typing import Any

from starlette.responses import PlainTextResponse, Response

from quartet.http_gateway.http import errors
from quartet.runtime import control
from quartet.runtime.control import ControlCommand
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Reply

Render = Callable[[Reply], Response]


def render(command: ControlCommand, reply: Reply) -> Response:
    return RENDER.get(type(command), plain)(reply)


def status_of(reply: Reply) -> int:
    return 400 if not reply.success and reply.status == 200 else reply.status


def plain(reply: Reply) -> Response:
    body = {"success": reply.success, "message": reply.message, **(reply.body or {})}
    return errors.json_response(body, status_of(reply))


def spoken(reply: Reply) -> Response:
    """The message alone, as text, whether the command was carried out or refused."""
    return PlainTextResponse(reply.message, status_of(reply))


def told(reply: Reply) -> Response:
    """The message alone, as text; a refusal as a native error."""
    if reply.success:
        return PlainTextResponse(reply.message)
    return errors.native(RequestError(reply.message, errors.KIND_OF_STATUS.get(reply.status, Kind.BAD_REQUEST)))


def only(*keys: str, **defaults: Any) -> Render:
    """Success, message, and these keys of the reply's body where it has them."""

    def shown(reply: Reply) -> Response:
        said = {**defaults, **(reply.body or {})}
        body = {"success": reply.success, "message": reply.message, **{key: said[key] for key in keys if key in said}}
        return errors.json_response(body, status_of(reply))

    return shown


def content(body: Callable[[Reply], Any]) -> Render:
    """This body where the command was carried out, success and message where it was refused."""

    def shown(reply: Reply) -> Response:
        return errors.json_response(body(reply)) if reply.success else only()(reply)

    return shown


def nothing(reply: Reply) -> None:
    """`null`: clients parse it."""


def status_and_message(reply: Reply) -> dict[str, Any]:
    return {"message": reply.message, "status": "ok"}


def rows_of_tensor(reply: Reply) -> Response:
    if not reply.success or reply.body is None:
        return errors.json_response({"error": {"message": reply.message}}, 400)
    return errors.json_response(reply.body["rows"])


RENDER: dict[type[ControlCommand], Render] = {
    control.FlushCache: spoken,
    control.StartExpertDistributionRecord: told,
    control.StopExpertDistributionRecord: told,
    control.DumpExpertDistributionRecord: told,
    control.UpdateWeightsFromDisk: only("num_paused_requests", num_paused_requests=0),
    control.UpdateWeightsFromTensor: only(),
    control.UpdateWeightsFromDistributed: only(),
    control.EndWeightUpdate: only(),
    control.UpdateWeightVersion: only("new_version", "num_aborted_requests"),
    control.GetWeightsByName: rows_of_tensor,
    control.CheckWeights: only("ranks", "per_engine_checksum", ranks=[], per_engine_checksum=None),
    control.PauseGeneration: content(status_and_message),
    control.ContinueGeneration: content(status_and_message),
    control.ReleaseMemory: content(nothing),
    control.ResumeMemory: content(nothing),
    control.FreezeGarbage: told,
    control.SlowDown: content(nothing),
    control.StartProfile: told,
    control.StopProfile: told,
}
