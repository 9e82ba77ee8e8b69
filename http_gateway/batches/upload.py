"""The file of a multipart upload: bounded while it arrives, and on the disk where it is large."""

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.datastructures import FormData, UploadFile
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.routes.endpoint import require_plain
from quartet.runtime.errors import Kind, RequestError

MOST_FIELDS = 8
FRAME_BYTES = 64 << 10  # of a body beside its file
TOO_LARGE = "The request body exceeds the limit of {} bytes for files (--files-store-size)."


@asynccontextmanager
async def form_of(http: HTTPRequest, most_bytes: int) -> AsyncGenerator[FormData, None]:
    """The fields and the one file of a request. Raises RequestError."""
    require_plain(http)
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "multipart/form-data":
        raise RequestError("A file is sent as multipart/form-data, with the fields file and purpose.", field="file")
    parser = MultiPartParser(
        http.headers, bounded(http, most_bytes + FRAME_BYTES, most_bytes), max_files=1, max_fields=MOST_FIELDS
    )
    try:
        form = await parser.parse()
    except MultiPartException as error:
        raise RequestError(f"Invalid multipart body: {error.message}", field="file") from None
    except KeyError:  # what Starlette raises without a boundary
        raise RequestError("Invalid multipart body: the content type has no boundary.", field="file") from None
    except (UnicodeError, LookupError):  # a charset that does not exist, or that these bytes are not in
        raise RequestError(
            "Invalid multipart body: its text is not in the charset that it names.", field="file"
        ) from None
    except OSError as error:  # where large uploads are kept until they are whole
        raise RequestError(f"The file cannot be kept: {error.strerror}", Kind.UNAVAILABLE, "file") from error
    try:
        yield form
    finally:
        await form.close()


async def bounded(http: HTTPRequest, most_bytes: int, told: int) -> AsyncGenerator[bytes, None]:
    """The body as it arrives. Raises RequestError (413) behind so many bytes.

    As much again is read and thrown away before, so that a client that still sends gets to see the answer.
    """
    received = 0
    async for part in http.stream():
        received += len(part)
        if received <= most_bytes:
            yield part
        elif received > 2 * most_bytes:
            break
    if received > most_bytes:
        raise RequestError(TOO_LARGE.format(told), Kind.TOO_LARGE, "file")


def file_in(form: FormData) -> UploadFile:
    """The file of a form. Raises RequestError where there is none."""
    file = form.get("file")
    if not isinstance(file, UploadFile):
        raise RequestError("file is missing: a part of the body with a filename.", field="file")
    try:
        (file.filename or "").encode()
    except UnicodeEncodeError:
        raise RequestError("file: its filename is no Unicode text.", field="file") from None
    return file
