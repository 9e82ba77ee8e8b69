"""Environment variables that give flags their values: `QUARTET_<FLAG>` for each, and a few names of other servers.

Pure: names and values in, settings and lines for the operator out.
"""

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence

from quartet.runtime.errors import UsageError

PREFIX = "QUARTET_"
CONFIG = "QUARTET_CONFIG"  # the same as --config
NO_FLAGS = {"QUARTET_CPU_ISA", "QUARTET_REAL_MODELS"}  # read where they count
# Kubernetes sets these in every pod of a namespace that has a service named quartet; QUARTET_PORT is a URL then
SERVICE_LINK = re.compile(r"QUARTET_(SERVICE_|PORT_\d).*")
SERVICE_PORT, SERVICE_URL = "QUARTET_PORT", "tcp://"
NEAR = 0.85

Names = Mapping[str, Sequence[str]]  # setting → its variables, the first ones count before the others


def variable_of(spelling: str) -> str:
    """The variable of a flag: `--max-total-tokens` → QUARTET_MAX_TOTAL_TOKENS."""
    return PREFIX + spelling.lstrip("-").replace("-", "_").upper()


def values(names: Names, environment: Mapping[str, str]) -> dict[str, tuple[str, str]]:
    """Setting → variable and value, of those that the environment gives. Raises UsageError where two contradict."""
    found = {}
    for setting, variables in names.items():
        given = [name for name in variables if name in environment and not is_service_link(name, environment[name])]
        ours = [name for name in given if name.startswith(PREFIX)]
        if len({environment[name] for name in ours}) > 1:
            raise UsageError(f"{ours[0]} and {ours[1]} are one setting with two values; unset one of them")
        if given:
            found[setting] = given[0], environment[given[0]]
    return found


def is_service_link(name: str, value: str) -> bool:
    """Whether Kubernetes has set a variable, and not the operator."""
    return name == SERVICE_PORT and value.startswith(SERVICE_URL)


def notes(known: Iterable[str], environment: Mapping[str, str]) -> list[str]:
    """What is said of variables that look like one of ours written wrongly."""
    names = [*known, CONFIG]
    found = []
    for name in sorted(environment):
        if not name.startswith(PREFIX) or name in names or name in NO_FLAGS or SERVICE_LINK.fullmatch(name):
            continue
        if near := difflib.get_close_matches(name, names, n=1, cutoff=NEAR):
            found.append(f"The variable {name} is not known and has no effect; did you mean {near[0]}?")
    return found
