"""Every control command: its HTTP path, its fields, and who answers.

A command is a tagged struct here and one handler function in the service that carries it out (as a rule
`scheduler_service/control.py`). It travels the ring like a request, so it is ordered with them. Hops in the middle
forward it; the reply is a `Reply` with the same id. The gateway builds a route for every member of `Command` that
has a path.
"""

from typing import Any, ClassVar

import msgspec

from runtime.messages import Chat, Message


class ControlCommand(Message, kw_only=True):
    """Base of all commands. `path` is None for those that no client may send."""

    path: ClassVar[str | None] = None
    aliases: ClassVar[tuple[str, ...]] = ()
    methods: ClassVar[tuple[str, ...]] = ("POST",)
    admin: ClassVar[bool] = True  # guarded by the admin key where there is one

    id: str = ""  # set by the gateway, copied into the Reply


class Abort(ControlCommand, tag="abort_request", kw_only=True):
    """End requests: one rid, all whose rid starts with it (`prefix`), or all. No reply is sent."""

    path = "/abort_request"
    rid: str = ""
    abort_all: bool = False
    prefix: bool = False
    abort_message: str = ""


class FlushCache(ControlCommand, tag="flush_cache", kw_only=True):
    """Forget the prefix cache, once nothing runs or waits; wait up to `timeout` seconds for that."""

    path = "/flush_cache"
    methods = ("GET", "POST")
    timeout: float = 0.0


class Probe(ControlCommand, tag="probe", kw_only=True):
    """Goes once round the ring; every hop adds its counters under its role. Answered by the gateway itself."""

    counters: dict[str, dict[str, Any]] = {}


class Tokenize(ControlCommand, tag="tokenize", kw_only=True):
    """Answered by the tokenizer: body {"tokens": [[int]]}."""

    texts: list[str] = []
    chat: Chat | None = None
    add_special_tokens: bool = True


class Detokenize(ControlCommand, tag="detokenize", kw_only=True):
    """Answered by the detokenizer: body {"texts": [str]}."""

    ids: list[bytes] = []
    skip_special_tokens: bool = True


Command = Abort | FlushCache | Probe | Tokenize | Detokenize

COMMANDS: tuple[type[ControlCommand], ...] = Command.__args__


def routes() -> dict[str, type[ControlCommand]]:
    """HTTP path → command, aliases included."""
    return {path: command for command in COMMANDS if command.path for path in (command.path, *command.aliases)}


def from_body(command: type[ControlCommand], body: bytes) -> ControlCommand:
    """Decode a request body (empty, `null` and `{}` mean all defaults); msgspec errors name the field."""
    return msgspec.json.decode(body if body.strip() not in (b"", b"null") else b"{}", type=command)
