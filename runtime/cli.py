"""The `quartet` command: a table of subcommands, each imported only when it is asked for."""

import errno
import importlib
import os
import signal
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from quartet.runtime.process import streams

if TYPE_CHECKING:
    import argparse


class Command(NamedTuple):
    """A subcommand: `function(arguments) -> exit status` in `module`."""

    module: str
    function: str
    help: str
    server_flags: bool = False  # takes the flags of a server, so that their help needs no import of the module
    parser: str = ""  # "module:function" that makes the parser of its arguments, where that needs no slow import
    prints: bool = False  # its output is its purpose: where it can go nowhere, the command has failed


COMMANDS = {
    "serve": Command("quartet.runtime.launcher.launch", "main", "start a server", True),
    "chat": Command(
        "quartet.runtime.client.chat",
        "main",
        "talk to a model; starts a server if there is none",
        parser="quartet.runtime.client.arguments:chat_parser",
    ),
    "health": Command(
        "quartet.runtime.client.health",
        "main",
        "how a running server and its processes are",
        parser="quartet.runtime.client.arguments:health_parser",
        prints=True,
    ),
    "pull": Command(
        "quartet.runtime.local_models.pull",
        "main",
        "fetch a model from the hub",
        parser="quartet.runtime.local_models.arguments:pull_parser",
    ),
    "models": Command(
        "quartet.runtime.local_models.stored",
        "main",
        "list the models on this machine, or remove some",
        parser="quartet.runtime.local_models.arguments:models_parser",
        prints=True,
    ),
    "bench": Command(
        "quartet.runtime.bench.main",
        "main",
        "put load on a running server and measure it",
        parser="quartet.runtime.bench.arguments:bench_parser",
    ),
    "run-batch": Command(
        "quartet.runtime.batch.command",
        "main",
        "answer a file of requests in OpenAI's batch format",
        parser="quartet.runtime.batch.arguments:run_batch_parser",
    ),
    "config": Command(
        "quartet.runtime.settings.show",
        "main",
        "config show: print each setting and where its value comes from",
        True,
        prints=True,
    ),
    "completion": Command(
        "quartet.runtime.completion",
        "main",
        "completion bash | zsh | fish: a script for the shell's completion",
        parser="quartet.runtime.completion:completion_parser",
        prints=True,
    ),
    "experts": Command("quartet.runtime.experts_plot", "main", "experts plot dump.pt: draw a recording of experts"),
}
HELP, HELP_ALL = ("-h", "--help"), "--help-all"
EXAMPLES = """\
  quartet serve                                      the embedded model, on port 30000
  quartet serve Qwen/Qwen2.5-0.5B-Instruct           one from the hub; a directory or a GGUF file as well
  quartet chat                                       talk to it
  quartet <command> --help"""
INTERRUPTED, UNREAD = 128 + signal.SIGINT, 128 + signal.SIGPIPE  # as shells report it


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand and return its exit status.

    Where the reader of its output has left, it ends without a word, with the status of SIGPIPE. Output that cannot be
    written, to a full disk for example, is one line on stderr and the status 1. Ctrl-C ends a command without a word,
    also while it is imported.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    closed = sys.stdout is None
    try:
        streams.keep_standard()
        status = dispatch(arguments)
        if not status:
            if closed and only_prints(arguments):
                return unwritten(OSError(errno.EBADF, os.strerror(errno.EBADF)))
            sys.stdout.flush()
        return status
    except BrokenPipeError:
        return UNREAD
    except OSError as error:
        if not streams.is_of_output(error):
            raise
        return unwritten(error)
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        streams.settle()


def only_prints(arguments: Sequence[str]) -> bool:
    """Whether a command line does nothing but print: help, the version, or what a command finds out."""
    name = arguments[0] if arguments else ""
    return name not in COMMANDS or COMMANDS[name].prints or not set(arguments).isdisjoint((*HELP, HELP_ALL))


def unwritten(error: OSError) -> int:
    """Say why there is no output; returns the exit status."""
    from quartet.runtime.log import plain, say

    say(plain(f"quartet: the output could not be written: {streams.cause(error)}"), sys.stderr)
    return 1


def dispatch(arguments: list[str]) -> int:
    """Run the subcommand that the arguments name; returns its exit status."""
    match arguments:
        case [] | ["-h" | "--help"]:
            print(usage())
            return 0
        case ["--version" | "-V"]:
            from quartet.runtime.version import version  # what it imports takes longer than all else here

            print(f"quartet {version()}")
            return 0
        case [name, *rest] if name in COMMANDS:
            command = COMMANDS[name]
            if not set(rest).isdisjoint((*HELP, HELP_ALL)) and (command.server_flags or command.parser):
                return print_help(name, everything=HELP_ALL in rest or rest[-1] == "all")
            function = getattr(importlib.import_module(command.module), command.function)
            return int(function(rest))
    return unknown(arguments[0], arguments[1:])


def usage() -> str:
    """The text of `quartet --help`."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {command.help}" for name, command in COMMANDS.items()]
    return "\n".join(
        [
            "usage: quartet <command> [flags]",
            "",
            "Serves a language model over HTTP. `quartet serve` alone serves the embedded one.",
            "",
            *lines,
            "",
            "examples:",
            EXAMPLES,
            "",
            "  --help, --version",
        ]
    )


def print_help(name: str, everything: bool) -> int:
    """What `quartet <name> --help` shows; of a server's flags those of the first page, or all of them."""
    if COMMANDS[name].server_flags:
        from quartet.runtime.settings.help_page import page

        print(page(name, everything))
    else:
        parser_of(COMMANDS[name]).print_help()
    return 0


def parser_of(command: Command) -> "argparse.ArgumentParser":
    """The parser of a command's arguments."""
    module, _, function = command.parser.partition(":")
    parser: argparse.ArgumentParser = getattr(importlib.import_module(module), function)()
    return parser


def unknown(word: str, rest: Sequence[str]) -> int:
    """Say which command or spelling was probably meant."""
    from difflib import get_close_matches

    from quartet.runtime.peers import instead

    if word.startswith("-"):
        hint = f"put flags after a command: quartet serve {word} ..."
    elif known := instead(word, rest):
        hint = f"here it is: {known}"
    elif "/" in word or word.lower().endswith(".gguf") or word == "demo":
        hint = f"to serve that model: quartet serve {word}; to talk to it: quartet chat {word}"
    else:
        near = get_close_matches(word, COMMANDS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"the commands are {', '.join(COMMANDS)}"
    from quartet.runtime.log import plain, say

    say(plain(f"quartet: unknown command {word}; {hint}"), sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
