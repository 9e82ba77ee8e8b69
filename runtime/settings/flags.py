"""From the command line and a YAML file to a ServerConfig, remembering where each value came from.

Everything here is derived from the fields of `quartet.runtime.config.ServerConfig`; a new flag is one field there.
"""

import argparse
import difflib
import math
from collections import deque
from collections.abc import Callable, Container, Iterable, Mapping, MutableMapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NoReturn, get_args, get_origin, get_type_hints

import msgspec

from quartet.runtime.adapter_sources import words_of
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.flag import GROUPS, Flag
from quartet.runtime.model_files.files import read_small_text
from quartet.runtime.settings import environment as environments
from quartet.runtime.settings import foreign_flags, foreign_values, keys, variables
from quartet.runtime.shorten import short

MAX_CONFIG_BYTES = 1 << 20
LARGEST = (1 << 63) - 1  # integer that the processes can tell each other
DEFAULT, COMMAND_LINE = "default", "command line"
OTHERS = ("--config", "--help", "-h")  # flags that are no settings


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

    @property
    def variables(self) -> tuple[str, ...]:
        """Environment variables that give its value; the first of them that is set counts."""
        ours = [variables.variable_of(spelling) for spelling in self.spellings]
        return tuple(dict.fromkeys([*ours, *filter(None, [self.flag.variable])]))


class Settings(msgspec.Struct, frozen=True):
    """A configuration and where each of its values came from."""

    config: ServerConfig
    origins: dict[str, str]  # only of the fields that were given; all others are defaults
    notes: list[str] = []  # what was made of flags and values that other servers have

    def origin(self, name: str) -> str:
        return self.origins.get(name, DEFAULT)


def settings() -> dict[str, Setting]:
    """Every flag by its field's name, by groups, and within a group in the order of the fields."""
    hints = get_type_hints(ServerConfig, include_extras=True)
    found = {}
    for field in msgspec.structs.fields(ServerConfig):
        kind, *metadata = get_args(hints[field.name]) or (hints[field.name],)
        meta = next((m for m in metadata if isinstance(m, msgspec.Meta) and m.extra), None)
        if meta is not None and meta.extra is not None:
            found[field.name] = Setting(
                field.name, meta.description or "", meta.extra["flag"], field.default, describe(kind)
            )
    return dict(sorted(found.items(), key=lambda item: GROUPS.index(item[1].flag.group)))


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


def build_parser(command: str, shown: Container[str] | None = None) -> argparse.ArgumentParser:
    """All flags in their groups. Values stay strings; `load` gives them types.

    `shown`: the settings that its help lists; None: all.
    """
    parser = Parser(
        prog=f"quartet {command}",
        allow_abbrev=False,
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=44, width=120),
        argument_default=argparse.SUPPRESS,
        epilog="Each flag may also be given by a variable: --max-total-tokens by QUARTET_MAX_TOTAL_TOKENS, --config by "
        "QUARTET_CONFIG. Flags count before the file, and the file before variables.",
    )
    groups: dict[str, Any] = {}
    for setting in settings().values():
        name = setting.flag.group
        group = groups.setdefault(name, groups.get(name) or parser.add_argument_group(name))
        bare = "true" if setting.takes == NAMES[bool] else setting.flag.bare
        optional_value = {"nargs": "?", "const": bare} if bare else {}
        group.add_argument(
            *setting.spellings,
            dest=setting.name,
            metavar=setting.takes.replace(" ", ""),
            help=help_text(setting) if shown is None or setting.name in shown else argparse.SUPPRESS,
            **(optional_value or argument_of(setting.flag)),
        )
    parser.add_argument("--config", metavar="file.yaml", help="settings from a file; flags given here win")
    return parser


def argument_of(flag: Flag) -> dict[str, str]:
    """How often a flag may be given, and with how many values."""
    if flag.words:
        return {"action": "extend", "nargs": "+"}
    return {"action": "append"} if flag.several else {}


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
    words, notes = sorted_out(with_model(argv))
    given, rest = build_parser(command).parse_known_args(words)
    refuse_positional(rest, words)
    flags = {name: joined(name, value) for name, value in vars(given).items()}
    file = flags.pop("config", environment.get(variables.CONFIG) or None)
    values, file_notes = ({}, []) if file is None else read_file(Path(file))
    found = variables.values(variables_of_settings(), environment)
    texts = {name: joined(name, value) for name, (_, value) in found.items()}
    known = {variable for names in variables_of_settings().values() for variable in names}
    notes += environments.notes(environment, known) + variables.notes(known, environment)
    notes += file_notes + [note for source in (texts, values, flags) for note in translate(source)]
    origins = {name: f"variable {found[name][0]}" for name in texts}
    origins |= dict.fromkeys(values, str(file)) | dict.fromkeys(flags, COMMAND_LINE)
    checked = typed(texts, strict=False, label="{}", spell=lambda name: found[name][0])
    checked |= typed(values, strict=True, label="{} in " + str(file))
    checked |= typed(flags, strict=False, label="--{}", spell=dashed)
    places = {name: variable for name, (variable, _) in found.items()} | {name: f"{name} in {file}" for name in values}
    places = {name: place for name, place in places.items() if name not in flags}
    return Settings(keys.gathered(ServerConfig(**checked), places), origins, notes)


def with_model(argv: Sequence[str]) -> Sequence[str]:
    """The arguments with a first one that is no flag taken for the model: `quartet serve model.gguf`.

    Raises UsageError where a flag names a model too.
    """
    if not argv or is_flag(argv[0]):
        return argv
    spellings = settings()["model_path"].spellings
    if again := next((word for word in argv[1:] if word.split("=")[0].replace("_", "-") in spellings), None):
        raise UsageError(f"the model is named twice: {argv[0]} and {again}; leave one of them out")
    return [spellings[0], *argv]


def sorted_out(argv: Sequence[str]) -> tuple[list[str], list[str]]:
    """The arguments with our flags spelled in full, and notes on those of other servers. Raises UsageError."""
    words: list[str] = []
    notes: list[str] = []
    left = deque(argv)
    while left:
        word = left.popleft()
        if not is_flag(word):
            words.append(word)
            continue
        name, equals, value = word.partition("=")
        name = spelled(name, words)
        if name not in foreign_flags.FLAGS:
            words.append(name + equals + value)
            continue
        values = [value] if equals else []
        while not equals and left and not is_flag(left[0]):
            values.append(left.popleft())
        notes.append(considered(name, " ".join(values) if values else "true"))
    return words, notes


def is_flag(word: str) -> bool:
    return word.startswith("-") and word not in ("-", "--") and not word[1].isdigit() and word[1] != "."


def considered(name: str, value: str) -> str:
    """What holds for a flag of other servers with this value. Raises UsageError where it asks for what is not here."""
    flag = foreign_flags.FLAGS[name]
    shown = name if value == "true" or not flag.accepts else f"{name} {value}"
    if not flag.takes(value):
        raise UsageError(f"{shown} is not supported: {flag.advice}")
    return f"{shown} has no effect here: {flag.advice}"


def translate(values: dict[str, Any]) -> list[str]:
    """Replace values that other servers give to flags of ours by what they come to here, and say so."""
    notes = []
    for name, value in list(values.items()):
        known = foreign_values.VALUES.get((name, str(value)))
        if known is not None:
            notes.append(f"--{dashed(name)} {value} {known.why}")
            del values[name]
            if known.instead is not None:
                values[name] = known.instead
    return notes


def spelled(word: str, before: Sequence[str]) -> str:
    """The whole flag that a word names: itself, or the only one that begins like it. Raises UsageError."""
    name = word.replace("_", "-")
    ours = {spelling: setting.spelling for setting in settings().values() for spelling in setting.spellings}
    ours |= {spelling: spelling for spelling in OTHERS}
    known = {name: name for name in foreign_flags.FLAGS} | ours
    if name in known:
        return name
    found = {known[spelling] for spelling in known if name.startswith("--") and spelling.startswith(name)}
    if len(found) == 1:
        return found.pop()
    if before and before[-1] in secret_spellings():  # it may be a key, so it is not repeated here
        raise UsageError(f"{before[-1]} takes text; a key that begins with a dash is given as {before[-1]}=<key>")
    if found:
        raise UsageError(f"{word} may mean {', '.join(sorted(found)[:4])}{' and others' if len(found) > 4 else ''}")
    raise UsageError(f"unknown flag {word}{suggestion(word, ours)}")


def dashed(name: str) -> str:
    return name.replace("_", "-")


def variables_of_settings() -> dict[str, tuple[str, ...]]:
    return {name: setting.variables for name, setting in settings().items()}


def forget_secrets(environment: MutableMapping[str, str]) -> None:
    """Drop the variables that hold keys, so that no process started from here inherits them."""
    for setting in settings().values():
        for variable in setting.variables if setting.flag.secret else ():
            environment.pop(variable, None)


def refuse_positional(rest: Sequence[str], words: Sequence[str]) -> None:
    """Raise UsageError for the first argument that belongs to no flag."""
    if not rest:
        return
    flag = next((word for word in reversed(words[: words.index(rest[0])]) if is_flag(word)), "").split("=")[0]
    if flag in secret_spellings():  # it may be a key, so it is not repeated here
        raise UsageError(f"unexpected argument behind {flag}; several keys are separated by commas")
    has_model = any(word.split("=")[0] in settings()["model_path"].spellings for word in words)
    named = "flags start with --, and a model is named by --model-path"
    where = named if has_model else "a model stands in front of all flags, or behind --model-path"
    raise UsageError(f"unexpected argument {rest[0]!r}; {where}")


def secret_spellings() -> set[str]:
    return {spelling for setting in settings().values() if setting.flag.secret for spelling in setting.spellings}


def suggestion(word: str, known: Iterable[str]) -> str:
    """`; did you mean X?`, or a pointer to the help when nothing is near."""
    near = difflib.get_close_matches(word, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else "; `quartet serve --help-all` lists them all"


def read_file(path: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings of a YAML file by field name (dashes or underscores), and notes on those of other servers."""
    import yaml  # here, so that --help does not pay for it

    try:
        data = yaml.safe_load(read_small_text(path, MAX_CONFIG_BYTES))
    except StartupError as error:
        raise UsageError(str(error).replace(str(path), f"--config {path}", 1)) from error
    except (yaml.YAMLError, RecursionError) as error:
        raise UsageError(f"--config {path} is not valid YAML: {short(' '.join(str(error).split()))}") from error
    if data is None:
        return {}, []
    if not isinstance(data, dict):
        raise UsageError(f"--config {path} must hold `name: value` lines")
    values = {str(key).replace("-", "_"): value for key, value in data.items()}
    notes = []
    for key in sorted(values.keys() - settings().keys()):
        foreign = "--" + dashed(key)
        if foreign not in foreign_flags.FLAGS:
            raise UsageError(f"unknown key {key} in {path}{suggestion(key, settings())}")
        value = values.pop(key)
        notes.append(considered(foreign, str(value).lower() if isinstance(value, bool | None) else str(value)))
    return {name: joined(name, value) for name, value in values.items()}, notes


def joined(name: str, value: Any) -> Any:
    """The value of a setting that may have several: a list of words, or a text with commas. Raises UsageError."""
    flag = known.flag if (known := settings().get(name)) else None
    if flag is not None and flag.words and value is not None:
        return words_of(value, "--" + dashed(name))
    return ",".join(map(str, value)) if isinstance(value, list) else value


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
    checked = {name: getattr(config, name) for name in values}
    for name, value in checked.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise UsageError(f"{label.format(spell(name))} takes a finite number, not {values[name]!r}")
        if isinstance(value, int) and abs(value) > LARGEST:
            raise UsageError(
                f"{label.format(spell(name))} takes {settings()[name].takes} <= {LARGEST}, not {short(value)}"
            )
    return checked


def public(config: ServerConfig) -> dict[str, Any]:
    """Every setting by name, as plain values; secrets are masked."""
    return {
        name: "***" if setting.flag.secret and getattr(config, name) else getattr(config, name)
        for name, setting in settings().items()
    }
