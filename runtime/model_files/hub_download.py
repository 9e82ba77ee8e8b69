"""Fetches files of a repository from the hub, or finds them in its cache."""

import re
from pathlib import Path

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.hub_errors import explained

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?")


def is_hub_id(name: str) -> bool:
    return HUB_ID.fullmatch(name) is not None


def snapshot(flag: str, name: str, config: ServerConfig, patterns: tuple[str, ...], revision: str | None) -> Path:
    """The directory with the files of these patterns, from the cache where that is complete. Raises StartupError."""
    try:
        import huggingface_hub  # here, for it is slow and seldom needed
        from huggingface_hub.errors import HFValidationError
    except ImportError as error:
        raise StartupError(
            f"{flag} {name} is no directory here, and fetching it from the hub needs `pip install 'quartet-serve[hub]'`"
        ) from error
    try:
        found = huggingface_hub.snapshot_download(
            name, revision=revision, cache_dir=config.download_dir, allow_patterns=list(patterns)
        )
    except (OSError, ValueError, HFValidationError) as error:  # the hub's own errors derive from these
        raise StartupError(explained(flag, name, revision, error)) from error
    return Path(found)
