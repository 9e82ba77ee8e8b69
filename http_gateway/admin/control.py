"""Control endpoints: one route for every command that has a path, all from one generic handler.

What a client sees of a reply is `http_gateway/admin/replies.py`.
"""

import logging
from typing import Any

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.admin import payloads, replies
from quartet.http_gateway.http import errors
from quartet.http_gateway.http.auth import Access
from quartet.http_gateway.http.counting import ValueCounter
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import (
    Endpoint,
    Handler,
    body_parts,
    convert_body,
    of_adapters,
    of_commands,
    of_weights,
    read_body,
)
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime import control
from quartet.runtime.adapters import (
    LORA_OFF,
    AdapterCommand,
    Load,
    LoadAdapter,
    LoadAdapterFromDistributed,
    LoadAdapterFromTensors,
    UnloadAdapter,
)
from quartet.runtime.control import FROM_DISK, Abort, CheckWeights, ControlCommand, UpdateWeightsFromTensor
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.messages import Reply
from quartet.runtime.shorten import short

log = logging.getLogger(__name__)

ANSWER_TIMEOUT_S = 600.0  # added to the timeout in the command


def command_handler(kind: type[ControlCommand]) -> Handler:
    """The handler of one command: decode it, run it, answer with its reply."""

    async def handle(gateway: Gateway, http: HTTPRequest) -> Response:
        return await run_command(gateway, await read_command(kind, http))

    return handle


async def run_command(gateway: Gateway, command: ControlCommand) -> Response:
    """Send a command through the ring and render its reply. Raises RequestError."""
    return replies.render(command, await send_command(gateway, command))


async def send_command(gateway: Gateway, command: ControlCommand) -> Reply:
    """Send a command through the ring; its reply. Raises RequestError."""
    if gateway.config.dp_size > 1:
        refuse_beside_others(command)
    timeout_s = ANSWER_TIMEOUT_S + float(getattr(command, "timeout", None) or 0)
    try:
        reply = await gateway.ring.command(command, timeout_s)
    except TimeoutError:
        raise RequestError(f"No answer within {timeout_s:.0f} s.", Kind.INTERNAL) from None
    if not isinstance(reply, Reply):
        raise RequestError(f"The ring answered with {type(reply).__name__}.", Kind.INTERNAL)
    return reply


def refuse_beside_others(command: ControlCommand) -> None:
    """Raise RequestError for a change that a scheduler which is started again could not make up for."""
    resets = isinstance(command, CheckWeights) and command.action == "reset_tensors"
    if remedy := command.one_scheduler or (FROM_DISK if resets else ""):
        name = type(command).__struct_config__.tag
        raise RequestError(f"{name} needs a server with one scheduler (--dp-size 1); {remedy}.")


async def read_command(kind: type[ControlCommand], http: HTTPRequest) -> ControlCommand:
    """Read the body and decode it."""
    return await convert_body(http, decode_command, kind, http, await read_body(http))


def decode_command(kind: type[ControlCommand], http: HTTPRequest, body: bytes) -> ControlCommand:
    """Decode a command from a JSON body; parameters of the query string override its fields. Raises RequestError."""
    names = {field.name for field in msgspec.structs.fields(kind)}
    if body.strip() not in (b"", b"null"):
        bodies.refuse_misspelt(msgspec.json.decode(body, type=dict[str, msgspec.Raw]), kind)
    overrides = {name: value for name, value in http.query_params.items() if name in names}
    if not overrides:
        return control.from_body(kind, body)
    fields = msgspec.json.decode(body, type=dict[str, Any] | None) if body.strip() else None
    try:
        return msgspec.convert({**(fields or {}), **overrides}, kind, strict=False)
    except msgspec.ValidationError as error:
        raise RequestError(str(error)) from None


async def abort_request(gateway: Gateway, http: HTTPRequest) -> Response:
    """200 with an empty body, whether or not such a request is known."""
    command = await read_command(Abort, http)
    assert isinstance(command, Abort), command
    if not command.rid and not command.abort_all:
        log.warning("abort_request with neither a rid nor abort_all: nothing is aborted")
    found = gateway.ring.abort(command)
    log.info("abort_request: %d requests", found)
    return Response(status_code=200)


async def update_weights_from_tensor(gateway: Gateway, http: HTTPRequest) -> Response:
    """The tensors go into files as they arrive, the command with their paths round the ring."""
    with payloads.Upload(gateway.run_dir, gateway.config.tp_size) as upload:
        await feed(upload, gateway, http)
        command = await convert_body(http, decode_command, UpdateWeightsFromTensor, http, bytes(upload.skeleton))
        assert isinstance(command, UpdateWeightsFromTensor), command
        entries, command.serialized_named_tensors = command.serialized_named_tensors, []
        command.payload_files = upload.files_of(entries)
        return await run_command(gateway, command)


async def feed(upload: payloads.Upload, gateway: Gateway, http: HTTPRequest) -> None:
    """Read the body; what is left of it without its payloads is bounded like any other. Raises RequestError."""
    skeleton_bounds = of_commands(gateway.config)
    async for part in body_parts(http):
        await upload.feed(part)
        skeleton_bounds.check_size(len(upload.skeleton), ValueCounter())


async def load_adapter_from_tensors(gateway: Gateway, http: HTTPRequest) -> Response:
    """Likewise; the tensors stand in `serialized_named_tensors`, or in the older `serialized_tensors`.

    Trainers send as many copies as there are ranks: all are the same, and the first is used.
    """
    with payloads.Upload(gateway.run_dir, gateway.config.tp_size, copies=True) as upload:
        await feed(upload, gateway, http)
        command = await convert_body(http, decode_command, LoadAdapterFromTensors, http, bytes(upload.skeleton))
        assert isinstance(command, LoadAdapterFromTensors), command
        entries, command.serialized_named_tensors = command.serialized_named_tensors, []
        if command.serialized_tensors is not None:
            entries = [*entries, msgspec.Raw(msgspec.json.encode(command.serialized_tensors))]
            command.serialized_tensors = None
        try:
            command.payload_files = [await upload.one_of(entries)]
        except RequestError as error:
            return adapter_answer(gateway, command, refusal_of(command, error))
        return await run_adapter_command(gateway, command)


def adapter_handler(kind: type[AdapterCommand]) -> Handler:
    """The handler of a command without tensors."""

    async def handle(gateway: Gateway, http: HTTPRequest) -> Response:
        return await run_adapter_command(gateway, await read_command(kind, http))

    return handle


async def run_adapter_command(gateway: Gateway, command: ControlCommand) -> Response:
    """Send the command and answer with its reply."""
    try:
        if not gateway.config.enable_lora:
            raise RequestError(LORA_OFF)
        if isinstance(command, Load) and command.lora_name in gateway.base_names:
            raise RequestError(f"{short(command.lora_name)} is the name of the base model.", field="lora_name")
        reply = await send_command(gateway, command)
    except RequestError as error:
        reply = refusal_of(command, error)
    return adapter_answer(gateway, command, reply)


def refusal_of(command: ControlCommand, error: RequestError) -> Reply:
    return Reply(id=command.id, success=False, message=error.message, status=error.kind.status)


def adapter_answer(gateway: Gateway, command: ControlCommand, reply: Reply) -> Response:
    """A reply as clients see it; a refusal lists the adapters that there are."""
    if not reply.success and not reply.body:
        reply.body = {"loaded_adapters": gateway.adapters.paths}
    return replies.render(command, reply)


HANDLERS: dict[type[ControlCommand], Handler] = {
    Abort: abort_request,  # answered without a reply from the ring
    UpdateWeightsFromTensor: update_weights_from_tensor,
    LoadAdapter: adapter_handler(LoadAdapter),
    LoadAdapterFromTensors: load_adapter_from_tensors,
    LoadAdapterFromDistributed: adapter_handler(LoadAdapterFromDistributed),
    UnloadAdapter: adapter_handler(UnloadAdapter),
}
BOUNDS = {
    UpdateWeightsFromTensor: of_weights,
    LoadAdapterFromTensors: of_adapters,
}


def endpoint_of(path: str, kind: type[ControlCommand]) -> Endpoint:
    """The endpoint of a command at one of its paths."""
    access = Access.ADMIN if kind.admin else Access.USER
    handler = HANDLERS.get(kind) or command_handler(kind)
    shape = errors.native if kind is Abort else errors.control
    bounds = BOUNDS.get(kind, of_commands)
    return Endpoint(path, handler, kind.methods, access, shape, changes_state=True, body=kind, bounds=bounds)


ENDPOINTS = [endpoint_of(path, kind) for path, kind in control.routes().items()]
