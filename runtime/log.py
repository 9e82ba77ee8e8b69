"""Log lines in the form that operators' tools expect: `[YYYY-MM-DD HH:MM:SS] message`."""

import logging
import sys

from runtime.config import ServerConfig

FORMAT = "[%(asctime)s] %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
HTTP_FORMAT = "[%(asctime)s] %(levelname_and_colon)s %(message)s"
HTTP_LOGGERS = ("uvicorn", "uvicorn.error", "uvicorn.access")
QUIET = ("asyncio", "httpcore", "httpx", "huggingface_hub", "urllib3", "filelock")  # at debug they drown our lines


class LineFormatter(logging.Formatter):
    """Our form, with the level in front for the lines of the HTTP server: `[…] INFO:     127.0.0.1:1 - "GET / …"`."""

    def __init__(self) -> None:
        super().__init__(FORMAT, DATE_FORMAT)
        self._http = logging.Formatter(HTTP_FORMAT, DATE_FORMAT)

    def format(self, record: logging.LogRecord) -> str:
        if record.name not in HTTP_LOGGERS:
            return super().format(record)
        record.levelname_and_colon = f"{record.levelname + ':':<9}"
        return self._http.format(record)


def set_up_logging(config: ServerConfig) -> None:
    """Send everything to stderr at the configured level, access lines at theirs."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LineFormatter())
    logging.basicConfig(level=config.log_level.upper(), handlers=[handler], force=True)
    logging.getLogger("uvicorn.access").setLevel((config.log_level_http or config.log_level).upper())
    for name in QUIET:
        logging.getLogger(name).setLevel(logging.WARNING)
