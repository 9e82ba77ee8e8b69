"""`quartet completion bash|zsh|fish`: a script for the shell's completion, made of the commands and their flags."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from quartet.runtime.cli import COMMANDS, parser_of
from quartet.runtime.client.arguments import parsed
from quartet.runtime.client.arguments import parser_of as empty_parser
from quartet.runtime.errors import UsageError
from quartet.runtime.log import plain, say
from quartet.runtime.settings.flags import build_parser

PARSED_BY_HAND = {"config": ("show",), "experts": ("plot",)}  # first words of commands that have no such parser


class Flag(NamedTuple):
    """One flag of a command."""

    spellings: tuple[str, ...]
    help: str
    values: tuple[str, ...]  # those that it takes, where they are few
    takes_value: bool


class Command(NamedTuple):
    """One command: its flags, and the words that may stand behind it."""

    name: str
    help: str
    flags: tuple[Flag, ...]
    words: tuple[str, ...]


def main(argv: Sequence[str]) -> int:
    """Print the script of one shell; returns the exit status."""
    try:
        shell = parsed(completion_parser(), argv).shell
    except UsageError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2
    print(SHELLS[shell](tuple(commands())))
    return 0


def completion_parser() -> argparse.ArgumentParser:
    """The arguments of `quartet completion`."""
    parser = empty_parser("completion", DESCRIPTION)
    parser.add_argument("shell", choices=sorted(SHELLS))
    return parser


DESCRIPTION = """Print a script for a shell's completion.

    bash   source <(quartet completion bash)                        in ~/.bashrc
    zsh    source <(quartet completion zsh)                         in ~/.zshrc, behind compinit
    fish   quartet completion fish > ~/.config/fish/completions/quartet.fish"""


def commands() -> Iterator[Command]:
    """All commands with what may stand behind them."""
    for name, command in COMMANDS.items():
        help = command.help.partition(": ")[2] or command.help
        actions: list[argparse.Action] = []
        if command.server_flags or command.parser:
            parser = build_parser(name) if command.server_flags else parser_of(command)
            actions = parser._actions  # argparse has no public list
        words = [str(word) for action in actions if not action.option_strings for word in action.choices or ()]
        yield Command(name, help, tuple(map(flag_of, filter(is_flag, actions))), PARSED_BY_HAND.get(name, tuple(words)))


def is_flag(action: argparse.Action) -> bool:
    return bool(action.option_strings)


def flag_of(action: argparse.Action) -> Flag:
    """A flag, with the values that its type or its metavar (`a|b`) names."""
    shown = action.metavar if isinstance(action.metavar, str) else ""
    values = tuple(map(str, action.choices or ())) or (tuple(shown.split("|")) if "|" in shown else ())
    help = " ".join((action.help or "").replace("%(default)s", str(action.default)).replace("%%", "%").split())
    return Flag(tuple(action.option_strings), help, values, action.nargs != 0)


def quoted(text: str) -> str:
    """In single quotes, for any shell but fish."""
    return "'" + text.replace("'", "'\\''") + "'"


# bash


def bash(commands: Sequence[Command]) -> str:
    """A function for bash 4 and later."""
    values = [
        f'        "{command.name} {spelling}") {BASH_REPLY.format(quoted(" ".join(flag.values)))} return ;;'
        for command in commands
        for flag in command.flags
        if flag.values
        for spelling in flag.spellings
    ]
    words = [
        f"        {command.name}) flags={quoted(' '.join(s for flag in command.flags for s in flag.spellings))} "
        f"words={quoted(' '.join(command.words))} ;;"
        for command in commands
    ]
    return BASH.format(
        names=quoted(" ".join(command.name for command in commands)), values="\n".join(values), words="\n".join(words)
    )


BASH_REPLY = 'COMPREPLY=($(compgen -W {} -- "$word"));'
BASH = """\
_quartet() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} flags= words=
    if ((COMP_CWORD == 1)); then
        COMPREPLY=($(compgen -W {names}' --help --version' -- "$word"))
        return
    fi
    case "${{COMP_WORDS[1]}} $before" in
{values}
    esac
    case "${{COMP_WORDS[1]}}" in
{words}
    esac
    if [[ $word == -* ]]; then
        COMPREPLY=($(compgen -W "$flags" -- "$word"))
    else
        COMPREPLY=($(compgen -W "$words" -- "$word") $(compgen -f -- "$word"))
    fi
}}
complete -o filenames -F _quartet quartet"""


# zsh


def zsh(commands: Sequence[Command]) -> str:
    """A function for zsh's compsys."""
    names = "\n".join(f"        {quoted(f'{command.name}:{escaped(command.help)}')}" for command in commands)
    cases = "\n".join(
        f"        {command.name})\n            _arguments -S \\\n{arguments_of(command)}\n            ;;"
        for command in commands
    )
    return ZSH.format(names=names, cases=cases)


def escaped(text: str) -> str:
    """For zsh, in which these characters end a description."""
    return "".join(f"\\{char}" if char in "[]:\\" else char for char in text)


def arguments_of(command: Command) -> str:
    """The lines of _arguments: flags, then words or files."""
    lines = [
        quoted(f"{spelling}[{escaped(flag.help)}]" + (f":value:({' '.join(flag.values)})" if flag.values else FILES))
        if flag.takes_value
        else quoted(f"{spelling}[{escaped(flag.help)}]")
        for flag in command.flags
        for spelling in flag.spellings
    ]
    rest = f"*:argument:({' '.join(command.words)})" if command.words else "*:argument:_files"
    return " \\\n".join(f"                {line}" for line in [*lines, quoted(rest)])


FILES = ":value:_files"
ZSH = """\
#compdef quartet
_quartet() {{
    local -a commands
    commands=(
{names}
    )
    if ((CURRENT == 2)); then
        _describe command commands
        return
    fi
    local command=$words[2]
    shift words
    ((CURRENT--))
    case $command in
{cases}
    esac
}}
compdef _quartet quartet"""


# fish


def fish(commands: Sequence[Command]) -> str:
    """Lines of `complete`."""
    lines = [
        f"complete -c quartet -f -n __fish_use_subcommand -a {command.name} -d {fish_quoted(command.help)}"
        for command in commands
    ]
    for command in commands:
        here = f"complete -c quartet -n '__fish_seen_subcommand_from {command.name}'"
        lines += [f"{here} {fish_options(flag)}" for flag in command.flags]
        if command.words:
            lines.append(f"{here} -a {fish_quoted(' '.join(command.words))}")
    return "\n".join(lines)


def fish_options(flag: Flag) -> str:
    """A flag's spellings, values and help as options of `complete`."""
    spellings = [f"-l {s[2:]}" if s.startswith("--") else f"-s {s[1:]}" for s in flag.spellings]
    values = [f"-x -a {fish_quoted(' '.join(flag.values))}"] if flag.values else ["-r"] if flag.takes_value else []
    return " ".join([*spellings, *values, f"-d {fish_quoted(flag.help)}"])


def fish_quoted(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


SHELLS: dict[str, Callable[[Sequence[Command]], str]] = {"bash": bash, "zsh": zsh, "fish": fish}
