"""A conversation and the commands that change it: what is typed becomes a message, or something said by the chat."""

import difflib
import re
from dataclasses import dataclass, field

COMMAND = re.compile(r"/([a-zA-Z?]*)(?:\s+(.*))?", re.DOTALL)  # /etc/hosts is a text
HELP = """\
/system TEXT   set the system prompt for what follows; without a text, show it
/reset         forget the conversation; the system prompt stays
/help          these lines
/exit          end, as Ctrl-D does
Enter sends, Alt-Enter (or \\ at the end of a line) begins a new line, Ctrl-C stops an answer."""

Message = dict[str, str]


class Leave(Exception):
    """The person wants to end the chat."""


@dataclass
class Conversation:
    """The messages so far."""

    system: str = ""
    turns: list[Message] = field(default_factory=list)

    def asking(self, text: str) -> list[Message]:
        """The messages of a request for the next answer."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, *self.turns, {"role": "user", "content": text}]

    def add(self, text: str, answer: str) -> None:
        """Keep a turn; one that was stopped before it said anything is no turn."""
        if answer:
            self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": answer}]

    def obey(self, text: str) -> str | None:
        """Carry out a command and return what to tell the person; None for a text that is a message.

        Raises Leave.
        """
        match = COMMAND.fullmatch(text.strip())
        if match is None:
            return None
        name, argument = match[1].lower(), (match[2] or "").strip()
        if name in ("exit", "quit", "bye", "q"):
            raise Leave
        command = COMMANDS.get(name)
        if command is None:
            near = difflib.get_close_matches(name, COMMANDS, n=1)
            return f"unknown command /{name}; {f'did you mean /{near[0]}?' if near else '/help lists them'}"
        return command(self, argument)


def set_system(conversation: Conversation, text: str) -> str:
    if not text:
        return conversation.system or "no system prompt is set"
    conversation.system = text
    return "the system prompt is set"


def reset(conversation: Conversation, text: str) -> str:
    conversation.turns.clear()
    return "the conversation is forgotten"


def show_help(conversation: Conversation, text: str) -> str:
    return HELP


COMMANDS = {"system": set_system, "reset": reset, "help": show_help, "?": show_help}
