"""Log lines in the form that operators' tools expect: `[YYYY-MM-DD HH:MM:SS] message`, or JSON (--log-format json).

Messages quote what clients and files say, so a message is made one line of harmless characters here, whoever writes
it: a new line, an escape sequence or text that runs backwards is shown as `\\n`, `\\x1b`, `\\u202e`. Only the lines of
a traceback stay lines; they are indented, so that none of them reads as one of the log. A line of JSON is ASCII, so
it needs no more than JSON's own escapes.

A record may have `fields` (`extra={"fields": {...}}`): members of its JSON object beside the message.
"""

import json
import logging
import os
import re
import sys
from datetime import UTC, datetime
from typing import Any, TextIO

from quartet.runtime.config import ServerConfig
from quartet.runtime.limits import MAX_LOG_CHARS
from quartet.runtime.process.streams import give_up

FORMAT = "[%(asctime)s] %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
CHATTY = (  # libraries, at debug and info
    *("asyncio", "filelock", "httpcore", "httpcore2", "httpx", "httpx2", "huggingface_hub", "urllib3"),
)
INDENT = "    "
# control characters, separators of lines and paragraphs, marks that turn the direction of text, invisible ones, and
# halves of surrogate pairs, which no stream can write
HARMFUL = re.compile(
    "[\x00-\x1f\x7f-\x9f\u061c\u180e\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb\ud800-\udfff]"
)


def plain(text: str) -> str:
    """The text as one line that a terminal shows and does not obey."""
    return HARMFUL.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def say(text: str, stream: TextIO | None) -> None:
    """Print for people, line by line; where nobody can read it any more, that is no reason to end."""
    if stream is None:
        return
    try:
        print("\n".join(map(plain, text.split("\n"))), file=stream, flush=True)
    except BrokenPipeError:
        give_up(stream)
    except (OSError, ValueError):
        pass


def put(text: str) -> None:
    """Print what a command was asked for. Raises OSError where there is no room for it or its reader has left."""
    print("\n".join(map(plain, text.split("\n"))), flush=True)


class Formatter(logging.Formatter):
    """One record, one line, and the traceback indented below it."""

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = plain(record.message[:MAX_LOG_CHARS])
        cut = len(record.message) - MAX_LOG_CHARS
        record.message = text if cut <= 0 else f"{text} ... ({cut} more characters)"
        return super().formatMessage(record)

    def formatException(self, ei: "logging._SysExcInfoType") -> str:
        return indented(super().formatException(ei))

    def formatStack(self, stack_info: str) -> str:
        return indented(stack_info)


class JsonFormatter(logging.Formatter):
    """One record, one JSON object on one line, with the process that wrote it."""

    def __init__(self, role: str) -> None:
        super().__init__()
        self._role = role

    def format(self, record: logging.LogRecord) -> str:
        """The line of a record."""
        text = record.getMessage().removeprefix(level_prefix(record))
        entry: dict[str, Any] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "role": self._role,
            "pid": os.getpid(),
            "logger": record.name,
            "message": text[:MAX_LOG_CHARS],
            **getattr(record, "fields", {}),
        }
        if len(text) > MAX_LOG_CHARS:
            entry["cut_chars"] = len(text) - MAX_LOG_CHARS
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)[-MAX_LOG_CHARS:]
        if record.stack_info:
            entry["stack"] = self.formatStack(record.stack_info)[-MAX_LOG_CHARS:]
        return json.dumps(entry, default=str).replace("\x7f", "\\u007f")


def level_prefix(record: logging.LogRecord) -> str:
    """The level as it stands before the lines of uvicorn and of access: operators' tools look for it."""
    return f"{record.levelname + ':':<10}"


def indented(text: str) -> str:
    return "\n".join(INDENT + plain(line) for line in text[-MAX_LOG_CHARS:].split("\n"))


class Handler(logging.StreamHandler[TextIO]):
    """Writes to stderr. A line that cannot be written (a full disk, a closed pipe) is lost and ends nothing."""

    def handleError(self, record: logging.LogRecord) -> None:
        pass


def set_up_logging(config: ServerConfig, role: str = "launcher") -> None:
    """Send everything to stderr at the configured level; of chatty libraries only warnings."""
    handler = Handler(sys.stderr)
    as_json = config.log_format == "json"
    handler.setFormatter(JsonFormatter(role) if as_json else Formatter(FORMAT, DATE_FORMAT))
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)


def writes_json() -> bool:
    """Whether the log of this process is JSON, so that lines for people would not fit into it."""
    return any(isinstance(handler.formatter, JsonFormatter) for handler in logging.getLogger().handlers)


def tell(text: str, level: int = logging.INFO, prefix: str = "") -> None:
    """One line on stderr for people, behind the prefix; where the log is JSON, a line of it."""
    if writes_json():
        logging.getLogger("quartet").log(level, "%s", text)
    else:
        say(prefix + plain(text), sys.stderr)
