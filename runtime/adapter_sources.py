"""Where adapters come from: the three forms of --lora-paths."""

from typing import Any

import msgspec

from quartet.runtime.errors import UsageError
from quartet.runtime.limits import MAX_ADAPTERS
from quartet.runtime.names import AdapterName


class AdapterSource(msgspec.Struct, frozen=True, kw_only=True):
    """One adapter to load at the start."""

    lora_name: AdapterName
    lora_path: str  # as given: a directory or a hub id
    pinned: bool = False  # never evicted
    directory: str = ""  # the local one that is read; filled in by the launcher


def read_source(text: str) -> AdapterSource:
    """One item of --lora-paths. Raises UsageError naming it."""
    if text.lstrip().startswith("{"):
        try:
            source = msgspec.json.decode(text, type=AdapterSource)
        except msgspec.DecodeError as error:
            raise UsageError(f"--lora-paths {text}: {error}") from error
    else:
        name, equals, path = text.partition("=")
        source = AdapterSource(lora_name=name, lora_path=path if equals else name)
    if not source.lora_name or not source.lora_path:
        raise UsageError(f"--lora-paths {text}: an adapter needs a name and a path, as in NAME=PATH")
    return source


def read_sources(items: list[str] | None) -> list[AdapterSource]:
    """All items of --lora-paths. Raises UsageError for one that cannot be read and for a name given twice."""
    sources = [read_source(item) for item in items or []]
    if len(sources) > MAX_ADAPTERS:
        raise UsageError(f"--lora-paths names {len(sources)} adapters; at most {MAX_ADAPTERS} are taken")
    seen: set[str] = set()
    for source in sources:
        if source.lora_name in seen:
            raise UsageError(f"--lora-paths names the adapter {source.lora_name} twice")
        seen.add(source.lora_name)
    return sources


def words_of(value: Any, flag: str) -> list[str]:
    """A list as a flag, a variable or a file may give it: words, a list, JSON, or a mapping of names to paths.

    Raises UsageError naming the flag.
    """
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        try:
            value = msgspec.json.decode(value)
        except msgspec.DecodeError as error:
            raise UsageError(f"{flag} {value}: {error}") from error
        value = [value] if isinstance(value, dict) and "lora_name" in value else value
    if isinstance(value, dict):
        return [f"{name}={path}" for name, path in value.items()]
    if isinstance(value, str):
        return value.split()
    if not isinstance(value, list):
        raise UsageError(f"{flag} takes a list, not {value!r}")
    return [msgspec.json.encode(item).decode() if isinstance(item, dict) else str(item) for item in value]
