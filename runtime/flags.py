"""From the command line and a YAML file to a ServerConfig, remembering where each value came from.

Everything here is derived from the fields of `runtime.config.ServerConfig`; a new flag is one field there.
"""

import argparse
import difflib
from collections.abc import Callable, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import msgspec

from runtime import keys
from runtime.config import Flag, ServerConfig
from runtime.errors import UsageError

DEFAULT, COMMAND_LINE = "default", "command line"
NO_DRAFT_MODEL = "Quartet runs no draft model; --speculative-algorithm NGRAM needs none"
UNSUPPORTED = {
    "--trust-remote-code": "Quartet never runs code that comes with a model",
    "--speculative-draft-model-path": NO_DRAFT_MODEL,
    "--speculative-num-steps": NO_DRAFT_MODEL,
    "--speculative-eagle-topk": NO_DRAFT_MODEL,
}


class Setting(msgspec.Struct, frozen=True):
    """One field of ServerConfig as a flag."""

    name: str
    help: str
    flag: Flag
    default: Any
    takes: str  # what a value looks like: "integer", "a | b", ...

    @property
    def spelling(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def spellings(self) -> tuple[str, ...]:
        return (self.spelling, *self.flag.aliases)


class Settings(msgspec.Struct, frozen=True):
    """A configuration and where each of its values came from."""

    config: ServerConfig
    origins: dict[str, str]  # only of the fields that were given; all others are defaults

    def origin(self, name: str) -> str:
        return self.origins.get(name, DEFAULT)


def settings() -> dict[str, Setting]:
    """Every flag by its field's name, in the order of the fields."""
    hints = get_type_hints(ServerConfig, include_extras=True)
    found = {}
    for field in msgspec.structs.fields(ServerConfig):
        kind, *metadata = get_args(hints[field.name]) or (hints[field.name],)
        meta = next((m for m in metadata if isinstance(m, msgspec.Meta) and m.extra), None)
        if meta is not None and meta.extra is not None:
            found[field.name] = Setting(
                field.name, meta.description or "", meta.extra["flag"], field.default, describe(kind)
            )
    return found


def describe(kind: Any) -> str:
    """The values of a field's type, for people."""
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    members = [member for member in get_args(kind) if member is not type(None)]
    if members and kind not in NAMES:
        return describe(members[0])
    return NAMES.get(kind, "text")


NAMES: dict[Any, str] = {int: "integer", float: "number", bool: "true | false", str: "text"}


class Parser(argparse.ArgumentParser):
    """An argparse parser whose errors are UsageErrors."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def build_parser(command: str) -> argparse.ArgumentParser:
    """All flags in their groups. Values stay strings; `load` gives them types."""
    parser = Parser(
        prog=f"quartet {command}",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
        argument_default=argparse.SUPPRESS,
    )
    groups: dict[str, Any] = {}
    for setting in settings().values():
        name = setting.flag.group
        group = groups.setdefault(name, groups.get(name) or parser.add_argument_group(name))
        optional_value = {"nargs": "?", "const": "true"} if setting.takes == NAMES[bool] else {}
        group.add_argument(
            *setting.spellings,
            dest=setting.name,
            metavar=setting.takes.replace(" ", ""),
            help=help_text(setting),
            action="append" if setting.flag.several else "store",
            **optional_value,
        )
    parser.add_argument("--config", metavar="file.yaml", help="settings from a file; flags given here win")
    return parser


def help_text(setting: Setting) -> str:
    text = setting.help.replace("%", "%%")
    if setting.flag.variable:
        text += f" (or the variable {setting.flag.variable})"
    stated = setting.default is None or setting.default is False or "default" in text
    return text if stated else f"{text} (default: {setting.default})"


def load(
    argv: Sequence[str], command: str = "serve", environment: Mapping[str, str] = MappingProxyType({})
) -> Settings:
    """Parse flags over the file over the environment over the defaults, and gather the keys.

    Raises UsageError naming the flag, key or variable and the remedy.
    """
    given, rest = build_parser(command).parse_known_args(list(argv))
    refuse_unknown(rest, argv)
    flags = {name: ",".join(value) if isinstance(value, list) else value for name, value in vars(given).items()}
    file = flags.pop("config", None)
    values = {} if file is None else read_file(Path(file))
    variables = {name: value for name, (_, value) in from_environment(environment).items()}
    origins = {name: f"variable {variable}" for name, (variable, _) in from_environment(environment).items()}
    origins |= dict.fromkeys(values, str(file)) | dict.fromkeys(flags, COMMAND_LINE)
    checked = typed(variables, strict=False, label="{}", spell=lambda name: settings()[name].flag.variable)
    checked |= typed(values, strict=True, label="{} in " + str(file))
    checked |= typed(flags, strict=False, label="--{}", spell=dashed)
    return Settings(keys.gathered(ServerConfig(**checked)), origins)


def dashed(name: str) -> str:
    return name.replace("_", "-")


def from_environment(environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Field → variable and value, of those that the environment gives."""
    variables = {name: setting.flag.variable for name, setting in settings().items() if setting.flag.variable}
    return {name: (variable, environment[variable]) for name, variable in variables.items() if variable in environment}


def forget_secrets(environment: MutableMapping[str, str]) -> None:
    """Drop the variables that hold keys, so that no process started from here inherits them."""
    for setting in settings().values():
        if setting.flag.secret and setting.flag.variable:
            environment.pop(setting.flag.variable, None)


def refuse_unknown(rest: Sequence[str], argv: Sequence[str]) -> None:
    """Raise UsageError for the first argument that is no flag of ours, suggesting the nearest one."""
    if not rest:
        return
    word = rest[0].split("=")[0]
    if word in UNSUPPORTED:
        raise UsageError(f"{word} is not supported: {UNSUPPORTED[word]}")
    if not word.startswith("-"):
        flag = next((word for word in reversed(argv[: argv.index(rest[0])]) if word.startswith("--")), "")
        if flag.split("=")[0] in secret_spellings():  # it may be a key, so it is not repeated here
            raise UsageError(f"unexpected argument behind {flag.split('=')[0]}; several keys are separated by commas")
        raise UsageError(f"unexpected argument {word!r}; flags start with --")
    spellings = ["--config", *(spelling for setting in settings().values() for spelling in setting.spellings)]
    raise UsageError(f"unknown flag {word}{suggestion(word, spellings)}")


def secret_spellings() -> set[str]:
    return {spelling for setting in settings().values() if setting.flag.secret for spelling in setting.spellings}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or a pointer to the help when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; `quartet serve --help` lists them all"


def read_file(path: Path) -> dict[str, Any]:
    """The settings of a YAML file by field name (dashes or underscores)."""
    import yaml  # here, so that --help does not pay for it

    try:
        data = yaml.safe_load(path.read_text())
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"cannot read --config {path}: {error}") from error
    except yaml.YAMLError as error:
        raise UsageError(f"--config {path} is not valid YAML: {' '.join(str(error).split())}") from error
    if data is None:
        return {}
    if not isinstance(data, dict):
        raise UsageError(f"--config {path} must hold `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in data.items()}
    for key in values.keys() - settings().keys():
        raise UsageError(f"unknown key {key} in {path}{suggestion(key, settings())}")
    for name, value in values.items():
        if settings()[name].flag.several and isinstance(value, list):
            values[name] = ",".join(map(str, value))
    return values


def typed(values: Mapping[str, Any], *, strict: bool, label: str, spell: Callable[[str], str] = str) -> dict[str, Any]:
    """The values with their fields' types. Raises UsageError naming the first that does not fit."""
    for name, value in values.items():
        try:
            msgspec.convert({name: value}, ServerConfig, strict=strict)
        except msgspec.ValidationError as error:
            bound = str(error).split(" - at")[0].rpartition("`")[2]  # " >= 1", where the type is right
            takes = settings()[name].takes
            shown = "what it was given" if settings()[name].flag.secret else repr(value)
            refused = f"{label.format(spell(name))} takes {takes}{bound if '=' in bound else ''}, not {shown}"
            raise UsageError(refused) from error
    config = msgspec.convert(dict(values), ServerConfig, strict=strict)
    return {name: getattr(config, name) for name in values}


def public(config: ServerConfig) -> dict[str, Any]:
    """Every setting by name, as plain values; secrets are masked."""
    return {
        name: "***" if setting.flag.secret and getattr(config, name) else getattr(config, name)
        for name, setting in settings().items()
    }
