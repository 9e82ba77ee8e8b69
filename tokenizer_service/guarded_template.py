"""The chat template in a process of its own, as the tokenizer sees it.

The sandbox meters what a template does, but format strings, filters and the compiler itself are code in C that no
meter interrupts. So templates are compiled and rendered where the kernel ends them (runtime/process/guarded.py), and
whatever they do, the tokenizer goes on. Nothing here loads jinja2.
"""

import logging
from typing import Any

import msgspec

from quartet.runtime import limits
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import Kind, RequestError, StartupError
from quartet.runtime.messages import Chat
from quartet.runtime.model_files.model_info import ModelInfo
from quartet.runtime.process.guarded import Crashed, Gone, Guarded, OutOfTime

log = logging.getLogger(__name__)

MODULE = "quartet.tokenizer_service.renderer"
WALL_S = 10.0
NOT_COMPILED = "the chat template of {} takes too much time or memory to compile{}"
START_CPU_S = 1.0
SLACK = 2.0  # the sandbox, which says more, should be the first to notice
BYTES_PER_S = 20e6  # of a conversation, only to read it


class Setup(msgspec.Struct):
    """What the process finds its template by."""

    info: ModelInfo
    config: ServerConfig


class Rendered(msgspec.Struct, omit_defaults=True):
    """A prompt, or the attributes of a RequestError."""

    text: str = ""
    error: dict[str, Any] | None = None


class Started(msgspec.Struct, omit_defaults=True):
    """What came of the start."""

    found: bool = False  # there is a template
    error: str = ""  # why the server cannot start
    notes: list[str] = []  # for the log


def started_template(info: ModelInfo, config: ServerConfig) -> "GuardedTemplate | None":
    """The served model's template, or None where it has none. Raises StartupError when it cannot be used."""
    process = Guarded(MODULE, msgspec.msgpack.encode(Setup(info, config)), wall_s=WALL_S)
    try:
        started = msgspec.msgpack.decode(process.run(b"", START_CPU_S), type=Started)
    except (Gone, OutOfTime, Crashed) as error:
        process.close()
        raise StartupError(NOT_COMPILED.format(info.path, f" ({error})" if str(error) else "")) from error
    for note in started.notes:
        log.info("%s", note)
    if started.found:
        return GuardedTemplate(process)
    process.close()
    if started.error:
        raise StartupError(started.error)
    return None


class GuardedTemplate:
    """Renders conversations; see quartet.tokenizer_service.prompts.Template."""

    def __init__(self, process: Guarded) -> None:
        self._process = process

    def render(self, chat: Chat) -> str:
        """The prompt. Raises RequestError."""
        order = msgspec.msgpack.encode(chat)
        allowed_s = limits.template_cpu_s(len(chat.messages))
        cpu_s = SLACK * allowed_s + len(order) / BYTES_PER_S
        try:
            rendered = msgspec.msgpack.decode(self._answer(order, cpu_s), type=Rendered)
        except OutOfTime as error:
            took = f"more than {allowed_s * 1000:.0f} ms"
            raise RequestError(f"the chat template failed: it took {took}", field="messages") from error
        except Crashed as error:
            raise RequestError("the chat template failed: it took too much memory", field="messages") from error
        except Gone as error:
            raise RequestError("The process that renders chat templates has ended.", Kind.UNAVAILABLE) from error
        if rendered.error is not None:
            raise unpacked(rendered.error)
        return rendered.text

    def _answer(self, order: bytes, cpu_s: float) -> bytes:
        """A process that was killed is started again, once."""
        try:
            return self._process.run(order, cpu_s)
        except Gone:
            return self._process.run(order, cpu_s)

    def close(self) -> None:
        self._process.close()


def packed(error: RequestError) -> dict[str, Any]:
    """All that an error says."""
    return {**vars(error), "kind": error.kind.name}


def unpacked(attributes: dict[str, Any]) -> RequestError:
    error = RequestError(attributes["message"])
    vars(error).update({**attributes, "kind": Kind[attributes["kind"]]})
    return error
