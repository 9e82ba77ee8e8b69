"""/v1/files: the files of batches, uploaded by clients or made by the server."""

import os
from typing import Any, BinaryIO

from starlette.requests import Request as HTTPRequest
from starlette.responses import FileResponse, Response
from starlette.types import ASGIApp, Receive, Scope, Send

from quartet.http_gateway.batches.expiry import FORM_FIELDS, wanted_s
from quartet.http_gateway.batches.pages import choice, page
from quartet.http_gateway.batches.service import runner_of
from quartet.http_gateway.batches.upload import file_in, form_of
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.http_gateway.routes.file_store import StoredFile
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.limits import MAX_NAME_CHARS
from quartet.runtime.shorten import short

PURPOSE = "batch"
DEFAULT_PAGE = MOST_PER_PAGE = 10_000


async def files(gateway: Gateway, http: HTTPRequest) -> Response:
    """POST keeps a file, GET lists those that are kept."""
    return await (upload if http.method == "POST" else listed)(gateway, http)


async def upload(gateway: Gateway, http: HTTPRequest) -> Response:
    """Keep the file of a multipart body."""
    most = max(0, await gateway.files.run(gateway.files.room))
    async with form_of(http, most) as form:
        purpose, file = form.get("purpose"), file_in(form)
        if purpose != PURPOSE:
            raise RequestError(f"purpose must be {PURPOSE!r}, got {short(str(purpose))!r}.", field="purpose")
        if beyond := sorted(form.keys() - {"file", "purpose", *FORM_FIELDS}):
            raise RequestError(f"{short(beyond[0])} is not a field of files.", field=short(beyond[0]))
        name = (file.filename or "")[:MAX_NAME_CHARS]
        keep_s = wanted_s(form)
        kept = await gateway.files.run(gateway.files.add, file.file, file.size or 0, name, purpose, keep_s)
    return errors.json_response(described(kept))


async def listed(gateway: Gateway, http: HTTPRequest) -> Response:
    """The files that are kept, the newest first."""
    order = choice(http, "order", ("desc", "asc"))
    found = await gateway.files.run(gateway.files.files, http.query_params.get("purpose"))
    if order == "desc":
        found.reverse()
    return errors.json_response(page(http, [described(file) for file in found], DEFAULT_PAGE, MOST_PER_PAGE))


async def one_file(gateway: Gateway, http: HTTPRequest) -> Response:
    """What is known of a file; DELETE forgets it, unless a batch reads it."""
    file = await found_file(gateway, http.path_params["id"])
    if http.method == "GET":
        return errors.json_response(described(file))
    if batch := runner_of(http).uses(file.id):
        raise RequestError(f"The batch {batch} reads this file; cancel it first.", Kind.CONFLICT)
    if not await gateway.files.run(gateway.files.delete, file.id):  # another request was faster
        raise no_such_file(file.id)
    return errors.json_response({"id": file.id, "object": "file", "deleted": True})


async def content(gateway: Gateway, http: HTTPRequest) -> ASGIApp:
    """The bytes of a file, all of them, also where it is deleted while they are sent."""
    file_id = http.path_params["id"]
    file = await gateway.files.run(gateway.files.content, file_id)
    if file is None:
        raise no_such_file(file_id)
    return Content(file)


class Content:
    """Sends what an open file holds, and closes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._file as file:
            path, status = f"/proc/self/fd/{file.fileno()}", os.fstat(file.fileno())  # no name that could be gone
            await FileResponse(path, media_type="application/octet-stream", stat_result=status)(scope, receive, send)


async def found_file(gateway: Gateway, file_id: str, field: str | None = None) -> StoredFile:
    """The file with this id. Raises RequestError (404; 400 for one that a field names)."""
    file = await gateway.files.run(gateway.files.file, file_id)
    if file is None:
        raise no_such_file(file_id, field)
    return file


def no_such_file(file_id: str, field: str | None = None) -> RequestError:
    """404; 400 for one that a field names."""
    kind = Kind.NOT_FOUND if field is None else Kind.BAD_REQUEST
    return RequestError(f"No such File object: {short(file_id)}", kind, field or "id")


def described(file: StoredFile) -> dict[str, Any]:
    """The object of the API."""
    return {"object": "file", **file._asdict(), "status": "processed", "status_details": None}


ENDPOINTS = [
    Endpoint("/v1/files", files, ("GET", "POST"), shape=errors.openai),
    Endpoint("/v1/files/{id}", one_file, ("GET", "DELETE"), shape=errors.openai),
    Endpoint("/v1/files/{id}/content", content, shape=errors.openai),
]
