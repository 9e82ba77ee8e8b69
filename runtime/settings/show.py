"""`quartet config show [flags]`: every setting, its value, and where the value comes from."""

import os
import sys
from collections.abc import Iterator, Sequence

from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.log import plain, say
from quartet.runtime.settings import flags
from quartet.runtime.settings.machine import look_at_machine
from quartet.runtime.settings.resolve import resolve


def main(argv: Sequence[str]) -> int:
    """Print the settings that `quartet serve` would run with; returns the exit status."""
    try:
        if list(argv[:1]) != ["show"]:
            raise UsageError("the command is `quartet config show`, followed by the flags of `quartet serve`")
        settings = flags.load(argv[1:], command="config show", environment=os.environ)
        resolution = resolve(settings.config, look_at_machine())
    except (UsageError, StartupError) as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2
    rows = list(origins(settings, flags.public(resolution.config)))
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    for name, value, origin in rows:
        say(f"{name:<{widths[0]}}  {value:<{widths[1]}}  {origin}", sys.stdout)
    for note in [*settings.notes, *resolution.notes]:
        say(f"\nnote: {plain(note)}", sys.stdout)
    return 0


def origins(settings: flags.Settings, resolved: dict[str, object]) -> Iterator[tuple[str, str, str]]:
    """Name, value and origin of each setting."""
    given = flags.public(settings.config)
    for name, value in resolved.items():
        origin = settings.origin(name)
        if value != given[name]:
            origin = "chosen for this machine" if name not in settings.origins else f"{origin}, adapted to this machine"
        yield name, "-" if value is None else plain(str(value)), plain(origin)
