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
    if isinstance(value, str):
        return words_of(decoded(value, flag) if is_json(value) else value.split(), flag)
    if isinstance(value, dict) and "lora_name" not in value:
        return [f"{name}={path}" for name, path in value.items()]
    if isinstance(value, dict):
        return [msgspec.json.encode(value).decode()]
    if not isinstance(value, list):
        raise UsageError(f"{flag} takes a list, not {value!r}")
    return [word for item in value for word in ([item] if is_word(item) else words_of(item, flag))]


def is_json(text: str) -> bool:
    return text.lstrip().startswith(("[", "{"))


def is_word(item: Any) -> bool:
    return isinstance(item, str) and not is_json(item)


def decoded(text: str, flag: str) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UsageError(f"{flag} {text}: {error}") from error
