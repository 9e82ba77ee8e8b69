"""Log lines in the form that operators' tools expect: `[YYYY-MM-DD HH:MM:SS] message`."""

import logging
import sys

from runtime.config import ServerConfig

FORMAT = "[%(asctime)s] %(message)s"
DATE_FORMAT = "%Y-%m-%d %H:%M:%S"
CHATTY = ("asyncio", "httpcore", "httpx", "huggingface_hub", "urllib3", "filelock")  # libraries, at debug and info


def set_up_logging(config: ServerConfig) -> None:
    """Send everything to stderr at the configured level; of chatty libraries only warnings."""
    logging.basicConfig(
        level=config.log_level.upper(), format=FORMAT, datefmt=DATE_FORMAT, stream=sys.stderr, force=True
    )
    for name in CHATTY:
        logging.getLogger(name).setLevel(logging.WARNING)
