"""The request log (--log-requests): one line for each call that may reach the model, at its end."""

import logging
from typing import Any

import msgspec

from quartet.http_gateway.http.call_record import CallRecord

log = logging.getLogger("http_gateway.requests")
log.setLevel(logging.INFO)  # whoever asks for these lines gets them, whatever --log-level says


def write(record: CallRecord) -> None:
    """Write the line of a call that has ended."""
    fields = record.fields()
    shown = " ".join(f"{name}={plain_value(value)}" for name, value in fields.items() if value is not None)
    log.info("Request ended. %s", shown, extra={"fields": fields})


def plain_value(value: Any) -> str:
    """A value as it stands in the text format: words and numbers as they are, everything else as JSON."""
    if isinstance(value, str) and value and not set(value) & set(' "=\n'):
        return value
    return msgspec.json.encode(value).decode()
