"""The server's keys: where they may stand, what cannot be one, and how they reach the one process that needs them.

A setting holds one key or several, separated by commas, which no bearer token contains (RFC 6750). A file holds one a
line; blank lines and lines that begin with # are left out.
"""

from collections.abc import Mapping
from pathlib import Path

import msgspec

from quartet.runtime.config import ResolvedConfig, ServerConfig
from quartet.runtime.errors import UsageError
from quartet.runtime.limits import MAX_API_KEY_BYTES, MAX_API_KEY_FILE_BYTES


def gathered(config: ServerConfig, places: Mapping[str, str]) -> ServerConfig:
    """The configuration with the keys of its files among its keys. Raises UsageError; its text names no key.

    `places`: where a setting was given, if not as a flag, as the user finds it again.
    """
    return msgspec.structs.replace(
        config,
        api_key=together(config.api_key, config.api_key_file, "api_key", places),
        admin_api_key=together(config.admin_api_key, config.admin_api_key_file, "admin_api_key", places),
    )


def without(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration as processes get it that check no key."""
    return msgspec.structs.replace(config, api_key=None, admin_api_key=None, ssl_keyfile_password=None)


def together(given: str | None, file: str | None, setting: str, places: Mapping[str, str]) -> str | None:
    """All keys of one kind, separated by commas; None where there is none."""
    flag = "--" + setting.replace("_", "-")
    keys = [] if given is None else split(given, places.get(setting, flag))
    if file is not None:
        keys += read_file(file, f"{flag}-file")
    return ",".join(dict.fromkeys(keys)) or None


def split(text: str, source: str) -> list[str]:
    """The keys of one setting. Raises UsageError where one is blank: a server must not be open by mistake."""
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise UsageError(
            f"{source} holds an empty key: is a variable unset? Leave {source} out to serve whoever comes"
            if len(keys) == 1
            else f"{source} holds an empty key between its commas"
        )
    for key in keys:
        check_key(key, source)
    return keys


def check_key(key: str, source: str) -> None:
    """Raise UsageError for a key that no header can carry."""
    if not key.isprintable():
        raise UsageError(f"{source} holds a key with a control character, which no header can carry")
    if len(key.encode(errors="replace")) > MAX_API_KEY_BYTES:
        raise UsageError(f"{source} holds a key of more than {MAX_API_KEY_BYTES} bytes")


def read_file(path: str, source: str) -> list[str]:
    """The keys of a file. Raises UsageError, also where it has none."""
    try:
        with Path(path).expanduser().open("rb") as file:
            data = file.read(MAX_API_KEY_FILE_BYTES + 1)
        lines = data.decode("utf-8-sig").splitlines()
    except RuntimeError:
        raise UsageError(f"cannot read {source} {path}: there is no home directory of that name") from None
    except (OSError, ValueError) as error:
        cause = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UsageError(f"cannot read {source} {path}: {cause}") from None
    if len(data) > MAX_API_KEY_FILE_BYTES:
        raise UsageError(f"{source} {path} is longer than {MAX_API_KEY_FILE_BYTES} bytes")
    keys = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
    if not keys:
        raise UsageError(f"{source} {path} holds no key")
    for number, key in enumerate(keys, start=1):
        if "," in key:
            raise UsageError(f"{source} {path} takes one key a line, and key {number} holds a comma")
        check_key(key, f"{source} {path}")
    return keys
