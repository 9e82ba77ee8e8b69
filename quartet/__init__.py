"""Quartet, a serving runtime for language models: every package of the repository under one import root.

In a checkout the entries beside this file are links to the packages at the top of the repository, so that Python,
type checkers and editors find `quartet.runtime` without an installation. An installed Quartet has the packages
themselves in their place (see `package-dir` in pyproject.toml).

The names of `__all__` are imported when they are asked for: every process of a server imports this file.
"""

from importlib import import_module

TYPE_CHECKING = False  # as type checkers know it, without the import of typing
if TYPE_CHECKING:
    from quartet.runtime.api.engine import Engine as Engine
    from quartet.runtime.api.server import Server as Server
    from quartet.runtime.api.server import launch as launch
    from quartet.runtime.api.transport import EngineError as EngineError
    from quartet.runtime.errors import StartupError as StartupError

PLACES = {
    "Engine": "quartet.runtime.api.engine",
    "EngineError": "quartet.runtime.api.transport",
    "Server": "quartet.runtime.api.server",
    "StartupError": "quartet.runtime.errors",
    "launch": "quartet.runtime.api.server",
}
ELSEWHERE = {  # what other packages call it
    "LLM": "Engine",
    "AsyncLLM": "Engine",
    "Runtime": "launch",
    "ServerArgs": "launch, whose keyword arguments are the server's flags",
}
__all__ = ["Engine", "EngineError", "Server", "StartupError", "launch"]


def __getattr__(name: str) -> object:
    if name not in PLACES:
        raise AttributeError(f"module 'quartet' has no attribute {name!r}{_hint(name)}")
    return getattr(import_module(PLACES[name]), name)


def _hint(name: str) -> str:
    """What may have been meant by a name that is not here; nothing for those that Python itself asks for."""
    if name.startswith("_"):
        return ""
    from difflib import get_close_matches  # seldom needed, and every process of a server imports this file

    near = get_close_matches(name.lower(), [known.lower() for known in __all__], n=1)
    meant = [known for known in __all__ if [known.lower()] == near]
    meant = [ELSEWHERE[name]] if name in ELSEWHERE else meant
    return f"; did you mean {meant[0]}?" if meant else ""


def __dir__() -> list[str]:
    return sorted({*globals(), *PLACES})
