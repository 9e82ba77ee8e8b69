"""The settings of whoever operates a server. They are fields of `ServerConfig`, which derives from this struct."""

from typing import Annotated, Literal

import msgspec

from quartet.runtime.flag import OPERATIONS, flag

LogFormat = Literal["text", "json"]
RequestLog = Literal["off", "metadata", "full"]


class OperatorConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Settings of logs."""

    log_format: Annotated[LogFormat, flag("text, or json: one object a line", OPERATIONS)] = "text"
    log_requests: Annotated[
        RequestLog,
        flag(
            "one line for each request at its end; metadata: id, route, status, tokens, times; full: the prompt and "
            "the output too, shortened",
            OPERATIONS,
            bare="metadata",
        ),
    ] = "off"
