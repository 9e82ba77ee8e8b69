"""The arguments of the commands that talk to a running server. They import nothing slow, for --help and completion."""

import argparse
import math
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from types import MappingProxyType

from quartet.runtime.errors import UsageError
from quartet.runtime.settings.flags import Parser, is_flag, settings
from quartet.runtime.settings.foreign_flags import FLAGS

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


def finite(text: str) -> float:
    """A number of the command line; raises ValueError for one that JSON cannot hold."""
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(text)
    return number


def parsed(
    parser: argparse.ArgumentParser, words: Sequence[str], hints: Mapping[str, str] = MappingProxyType({})
) -> argparse.Namespace:
    """The arguments. Raises UsageError; for an unknown flag it says what `hints` has for it, or which one is near."""
    actions = parser._actions  # argparse has no public list
    known = [spelling for action in actions for spelling in action.option_strings]
    for word in (word.split("=")[0] for word in words):  # first, for -hf would be -h with an argument
        if (hint := hints.get(word.replace("_", "-"))) and word not in known:
            raise UsageError(f"unknown flag {word}; {hint}")
    options, rest = parser.parse_known_args(list(words))
    if not rest:
        return options
    word = rest[0].split("=")[0]
    if not is_flag(word):
        raise UsageError(f"unexpected argument {rest[0]!r}; see {parser.prog} --help")
    near = get_close_matches(word, known, n=1)
    raise UsageError(f"unknown flag {word}; {f'did you mean {near[0]}?' if near else f'see {parser.prog} --help'}")


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
    parser.add_argument("--temperature", type=finite, metavar="NUMBER", help="(default: the server's)")
    parser.add_argument("--max-tokens", type=int, metavar="COUNT", help="longest answer (default: the server's)")
    return parser


def chat_hints() -> dict[str, str]:
    """What to say of flags that others have, and of those that belong to the server."""
    first = "the model comes first: quartet chat MODEL"
    server = {spelling: BEHIND.format(spelling) for setting in settings().values() for spelling in setting.spellings}
    others = {name: f"{flag.advice}; flags of the server stand behind --" for name, flag in FLAGS.items()}
    return others | server | CHAT_PEERS | dict.fromkeys(("-m", "--model", "--model-path", "-hf", "--model-name"), first)


BEHIND = "it is one of the server; put it behind --, when one is started: quartet chat MODEL -- {} ..."
CHAT_PEERS = {
    "-sys": "use --system",
    "--system-prompt": "use --system",
    "-n": "use --max-tokens",
    "--predict": "use --max-tokens",
    "--max-new-tokens": "use --max-tokens",
    "--temp": "use --temperature",
    "-p": "pipe the message in: echo Hello | quartet chat",
    "--prompt": "pipe the message in: echo Hello | quartet chat",
    "-q": "pipe the message in: echo Hello | quartet chat",
    "--quick": "pipe the message in: echo Hello | quartet chat",
    "--base-url": "use --url",
    "--host": "use --url http://HOST:PORT",
    "--port": "use --url http://HOST:PORT",
    "--verbose": "figures are shown below each answer",
}
HEALTH = """Say how a server is: a line for the whole and one for each of its processes.
The exit status is 0 if it is healthy, else 1."""


def health_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet health`."""
    parser = parser_of("health", HEALTH)
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:30000", help="(default: %(default)s)")
    parser.add_argument("--api-key", help=KEY_HELP)
    parser.add_argument("--timeout", type=finite, default=5.0, metavar="SECONDS", help="(default: %(default)s)")
    return parser
