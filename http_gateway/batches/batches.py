"""/v1/batches: files of requests that are answered when there is room for them."""

import time

import msgspec
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response

from quartet.http_gateway.batches import expiry, pages
from quartet.http_gateway.batches.batch import Batch, described, window_s
from quartet.http_gateway.batches.expiry import ExpiresAfter
from quartet.http_gateway.batches.files import PURPOSE, found_file
from quartet.http_gateway.batches.service import runner_of
from quartet.http_gateway.http import errors
from quartet.http_gateway.routes import bodies
from quartet.http_gateway.routes.endpoint import Endpoint, require_json
from quartet.http_gateway.routes.file_store import new_id
from quartet.http_gateway.routes.gateway import Gateway
from quartet.runtime.batch.lines import URLS
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.shorten import short

DEFAULT_PAGE, MOST_PER_PAGE = 20, 100
MOST_METADATA, MOST_KEY_CHARS, MOST_VALUE_CHARS = 16, 64, 512


class BatchBody(msgspec.Struct, kw_only=True):
    """Fields that are not here are ignored."""

    input_file_id: str
    endpoint: str
    completion_window: str
    metadata: dict[str, str] | None = None
    output_expires_after: ExpiresAfter | None = None


async def batches(gateway: Gateway, http: HTTPRequest) -> Response:
    """POST begins a batch, GET lists all, the newest first."""
    if http.method == "POST":
        return await begin(gateway, http)
    limit, after = pages.limit_of(http, DEFAULT_PAGE, MOST_PER_PAGE), http.query_params.get("after")
    found = await runner_of(http).newest(limit + 1, after)  # one more, to see whether there is one
    if found is None:
        raise pages.not_listed(str(after))
    return errors.json_response(pages.shown([described(batch) for batch in found], limit))


async def begin(gateway: Gateway, http: HTTPRequest) -> Response:
    """Begin a batch; its file is checked in the background."""
    require_json(http)
    body = await bodies.read_json_body(http, BatchBody)
    if body.endpoint not in URLS:
        raise RequestError(
            f"endpoint must be one of {', '.join(URLS)}, got {short(body.endpoint)!r}.", field="endpoint"
        )
    check_metadata(body.metadata or {})
    if (wanted := body.output_expires_after) is not None:
        expiry.check(wanted.anchor, wanted.seconds, ("output_expires_after.anchor", "output_expires_after.seconds"))
    seconds = window_s(body.completion_window)
    file = await found_file(gateway, body.input_file_id, "input_file_id")
    if file.purpose != PURPOSE:
        raise RequestError(f"input_file_id: the file's purpose is not {PURPOSE}.", field="input_file_id")
    now = int(time.time())
    batch = Batch(
        id=new_id("batch"),
        endpoint=body.endpoint,
        input_file_id=file.id,
        completion_window=body.completion_window,
        created_at=now,
        expires_at=now + seconds,
        metadata=body.metadata,
        output_expires_after=body.output_expires_after,
    )
    await runner_of(http).begin(batch)
    return errors.json_response(described(batch))


async def one_batch(gateway: Gateway, http: HTTPRequest) -> Response:
    """A batch as it is now."""
    return errors.json_response(described(await found(http)))


async def cancel(gateway: Gateway, http: HTTPRequest) -> Response:
    """Stop a batch. Its state is cancelling until its results are files."""
    batch = await found(http)
    if batch.over:
        raise RequestError(f"Cannot cancel a batch with status {batch.status!r}.", Kind.CONFLICT)
    return errors.json_response(await runner_of(http).cancel(batch))


async def found(http: HTTPRequest) -> Batch:
    """The batch that the path names. Raises RequestError (404)."""
    batch_id = http.path_params["id"]
    batch = await runner_of(http).get(batch_id)
    if batch is None:
        raise RequestError(f"No batch found with id '{short(batch_id)}'.", Kind.NOT_FOUND, "id")
    return batch


def check_metadata(metadata: dict[str, str]) -> None:
    """Raise RequestError where there is more of it than the API has."""
    fits = all(len(key) <= MOST_KEY_CHARS and len(value) <= MOST_VALUE_CHARS for key, value in metadata.items())
    if len(metadata) > MOST_METADATA or not fits:
        raise RequestError(
            f"metadata has at most {MOST_METADATA} entries, of {MOST_KEY_CHARS} and {MOST_VALUE_CHARS} characters.",
            field="metadata",
        )


ENDPOINTS = [
    Endpoint("/v1/batches", batches, ("GET", "POST"), shape=errors.openai),
    Endpoint("/v1/batches/{id}", one_batch, shape=errors.openai),
    Endpoint("/v1/batches/{id}/cancel", cancel, ("POST",), shape=errors.openai),
]
