"""Reads messages from a person at a terminal: several lines, and earlier messages with the arrow keys."""

from prompt_toolkit import PromptSession
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

MARK, MORE = "> ", ". "
CONTINUES = "\\"

keys = KeyBindings()


@keys.add("enter")
@keys.add("c-j")
def send_or_continue(event: KeyPressEvent) -> None:
    """Enter sends, unless the line ends with a backslash, which becomes a new line."""
    buffer = event.current_buffer
    if buffer.document.text_before_cursor.endswith(CONTINUES):
        buffer.delete_before_cursor(1)
        buffer.newline(copy_margin=False)
    else:
        buffer.validate_and_handle()


@keys.add("escape", "enter")
@keys.add("escape", "c-j")
def new_line(event: KeyPressEvent) -> None:
    event.current_buffer.newline(copy_margin=False)


class Prompt:
    """`read` returns one message. Raises EOFError at Ctrl-D, KeyboardInterrupt at Ctrl-C."""

    def __init__(self) -> None:
        self._session: PromptSession[str] = PromptSession(
            MARK,
            multiline=True,
            key_bindings=keys,
            history=InMemoryHistory(),
            prompt_continuation=MORE,
        )

    def read(self) -> str:
        return self._session.prompt()
