"""The process that compiles and renders chat templates; quartet.tokenizer_service.guarded_template starts it."""

import logging
import sys

import msgspec

from quartet.runtime import limits
from quartet.runtime.errors import RequestError, StartupError
from quartet.runtime.messages import Chat
from quartet.runtime.process import guarded
from quartet.runtime.process.memory import shrink
from quartet.tokenizer_service.chat import ChatTemplate, load_template
from quartet.tokenizer_service.guarded_template import Rendered, Setup, Started, packed


class Notes(logging.Handler):
    """Keeps what is logged, for the process that has a log."""

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def prepared(setup: bytes) -> guarded.Handle:
    """Compile the template, once for all workers. The first order, which is empty, asks how it went."""
    notes = Notes()
    logging.basicConfig(level=logging.INFO, handlers=[notes])
    given = msgspec.msgpack.decode(setup, type=Setup)
    template, error = None, ""
    try:
        template = load_template(given.info, given.config)
    except StartupError as refusal:
        error = str(refusal)
    if given.config.low_memory:
        shrink()  # before workers are forked
    started = msgspec.msgpack.encode(Started(template is not None, error, notes.lines))
    return lambda order: rendered(template, order) if order and template else started


def rendered(template: ChatTemplate, order: bytes) -> bytes:
    try:
        answer = Rendered(template.render(msgspec.msgpack.decode(order, type=Chat)))
    except RequestError as error:
        answer = Rendered(error=packed(error))
    return msgspec.msgpack.encode(answer)


def main() -> None:
    guarded.serve(int(sys.argv[1]), prepared, limits.TEMPLATE_MEMORY_BYTES)


if __name__ == "__main__":
    main()
