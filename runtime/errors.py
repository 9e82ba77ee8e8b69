"""The errors that cross a process border, and what each means to a client.

RequestError     one request cannot be served; it ends that request and nothing else
CommandRefused   a control command cannot be carried out now; nothing was changed
StartupError     the server cannot start; its text is the one line the operator sees
UsageError       the command line or the config file is wrong; likewise one line
"""

from enum import Enum


class Kind(Enum):
    """What went wrong with a request: HTTP status and the OpenAI-style type name."""

    BAD_REQUEST = (400, "BadRequestError")
    UNAUTHORIZED = (401, "UnauthorizedError")
    FORBIDDEN = (403, "ForbiddenError")
    NOT_FOUND = (404, "NotFoundError")
    CONFLICT = (409, "ConflictError")
    TOO_LARGE = (413, "BadRequestError")
    TOO_MANY = (429, "TooManyRequestsError")
    INTERNAL = (500, "InternalServerError")
    UNAVAILABLE = (503, "ServiceUnavailableError")

    @property
    def status(self) -> int:
        return self.value[0]

    @property
    def type_name(self) -> str:
        return self.value[1]


class RequestError(Exception):
    """One request is refused or has failed; `message` is safe to show to the client."""

    def __init__(
        self, message: str, kind: Kind = Kind.BAD_REQUEST, field: str | None = None, code: str | None = None
    ) -> None:
        """`code`: OpenAI's word for it, by which clients of that API tell one error from another."""
        super().__init__(message)
        self.message = message
        self.kind = kind
        self.field = field
        self.code = code


class FieldRefused(RequestError):
    """A field is refused for its name; `field` and `message` have the client's names, not the ring's."""


def too_long(message: str, field: str) -> RequestError:
    """The request cannot fit the context: clients that see the code shorten their conversation."""
    return RequestError(message, field=field, code="context_length_exceeded")


class CommandRefused(Exception):
    """A control command is refused; nothing was changed. `status` is the HTTP status to answer."""

    def __init__(self, message: str, status: int = 400) -> None:
        super().__init__(message)
        self.message = message
        self.status = status


class StartupError(Exception):
    """The server cannot start; `str(error)` names the cause and what to do, in one line."""


class UsageError(Exception):
    """The command line or the config file is wrong; `str(error)` names the flag and the remedy, in one line."""


# Refusals that more than one service makes, since each looks at what it is sent: one text, whoever is first.

EMPTY_IDS = "input_ids cannot be empty."


def not_whole_rows(width: int) -> RequestError:
    return RequestError(f"input_embeds must have rows of {width} numbers.", field="input_embeds")
