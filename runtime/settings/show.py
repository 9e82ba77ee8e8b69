"""`quartet config show [--yaml] [flags]`: every setting, its value, and where the value comes from.

With --yaml as a file that `--config` takes again: what was given, and as comments what was not. Keys are not shown.
"""

import math
import os
import sys
from collections.abc import Iterator, Sequence

from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.log import plain, put, say
from quartet.runtime.settings import flags
from quartet.runtime.settings.machine import look_at_machine
from quartet.runtime.settings.resolve import resolve

YAML = "--yaml"


def main(argv: Sequence[str]) -> int:
    """Print the settings that `quartet serve` would run with; returns the exit status."""
    try:
        if list(argv[:1]) != ["show"]:
            raise UsageError("the command is `quartet config show`, followed by the flags of `quartet serve`")
        given = [word for word in argv[1:] if word != YAML]
        settings = flags.load(given, command="config show", environment=os.environ)
        resolution = resolve(settings.config, look_at_machine())
    except (UsageError, StartupError) as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2
    if YAML in argv:
        put(as_yaml(settings))
        return 0
    rows = list(origins(settings, flags.public(resolution.config)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        put(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}")
    for note in [*settings.notes, *resolution.notes]:
        put(f"\nnote: {plain(note)}")
    return 0


def as_yaml(settings: flags.Settings) -> str:
    """The settings as a file for --config: those that were given as lines, the others and all keys as comments."""
    lines = [f"# {note}" for note in settings.notes]
    group = ""
    for name, setting in flags.settings().items():
        if setting.flag.group != group:
            group = setting.flag.group
            lines += ["", f"# {group}"]
        value = getattr(settings.config, name)
        if setting.flag.secret:
            if value:
                lines.append(f"# {name} is set and not shown; give it by the variable {setting.variables[0]}")
        elif name in settings.origins:
            lines.append(f"{line_of(name, value)}  # {settings.origin(name)}")
        else:
            lines.append(f"# {line_of(name, value)}")
    return "\n".join(lines).strip()


def line_of(name: str, value: object) -> str:
    """One setting as YAML."""
    import yaml  # here, so that --help does not pay for it

    return str(yaml.safe_dump({name: value}, width=math.inf)).strip()


def origins(settings: flags.Settings, resolved: dict[str, object]) -> Iterator[tuple[str, str, str]]:
    """Name, value and origin of each setting."""
    given = flags.public(settings.config)
    for name, value in resolved.items():
        origin = settings.origin(name)
        if value != given[name]:
            origin = "chosen for this machine" if name not in settings.origins else f"{origin}, adapted to this machine"
        yield name, "-" if value is None else plain(str(value)), plain(origin)
