"""The arguments of the commands that talk to a running server. They import nothing slow, for --help and completion."""

import argparse

from quartet.runtime.settings.flags import Parser

KEY_VARIABLE = "QUARTET_API_KEY"
KEY_HELP = f"key that the server asks for (default: the variable {KEY_VARIABLE})"
WIDTH = 110


def parser_of(command: str, description: str) -> argparse.ArgumentParser:
    """An empty parser for a command, whose errors are UsageErrors."""
    return Parser(
        prog=f"quartet {command}",
        description=description,
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=32, width=WIDTH),
    )


CHAT = """Talk to a model. A server that runs at --url, or on port 30000 with that model, is used; else one is started
and stopped at the end. Without a terminal, what is piped in is one message, and only the answer is printed.

In the chat: Enter sends, Alt-Enter begins a new line, Ctrl-C stops the answer, Ctrl-D ends. /help lists commands.
What stands behind -- are flags for the server that is started: quartet chat MODEL -- --dtype float32"""


def chat_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet chat`."""
    parser = parser_of("chat", CHAT)
    parser.add_argument("model", nargs="?", help="directory, GGUF file or hub id; without it, the embedded model")
    parser.add_argument("--url", help="a running server: this one or any with OpenAI's chat API")
    parser.add_argument("--api-key", help=KEY_HELP)
    parser.add_argument("--system", default="", metavar="TEXT", help="system prompt")
    parser.add_argument("--temperature", type=float, metavar="NUMBER", help="(default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="COUNT", help="longest answer (default: the server's)")
    return parser


HEALTH = """Say how a server is: a line for the whole and one for each of its processes.
The exit status is 0 if it is healthy, else 1."""


def health_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet health`."""
    parser = parser_of("health", HEALTH)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    parser.add_argument("--api-key", help=KEY_HELP)
    parser.add_argument("--timeout", type=float, default=5.0, metavar="SECONDS", help="(default: %(default)s)")
    return parser
