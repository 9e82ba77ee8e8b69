"""The instructions of a Dockerfile, as far as ours uses them, and which files its build may see."""

import fnmatch
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import PurePosixPath
from typing import NamedTuple

KNOWN = ("FROM", "RUN", "ARG", "ENV", "WORKDIR", "COPY", "USER", "EXPOSE", "STOPSIGNAL", "HEALTHCHECK", "ENTRYPOINT")
VARIABLE = re.compile(r"\$\{(\w+)\}|\$(\w+)")


class Instruction(NamedTuple):
    """One instruction; `text`: what stands behind its name, on one line."""

    name: str
    text: str


def parse(dockerfile: str) -> list[Instruction]:
    """The instructions in order. Raises ValueError for one that is not known here."""
    lines = [line for line in dockerfile.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    found = []
    for line in filter(str.strip, joined.splitlines()):
        name, _, text = line.strip().partition(" ")
        if name not in KNOWN:
            raise ValueError(f"{name} is not known here; {', '.join(KNOWN)} are")
        found.append(Instruction(name, text.strip()))
    return found


def assignments(text: str, environment: Mapping[str, str]) -> dict[str, str]:
    """The variables of an ENV or ARG; an ARG without a value is empty."""
    pairs = (word.partition("=") for word in shlex.split(text))
    return {name: substituted(value, environment) for name, _, value in pairs}


def substituted(text: str, environment: Mapping[str, str]) -> str:
    return VARIABLE.sub(lambda found: environment.get(found[1] or found[2], ""), text)


def health_command(text: str) -> str:
    """The command of a HEALTHCHECK."""
    return text.partition("CMD ")[2].strip()


def is_visible(path: PurePosixPath, patterns: Sequence[str]) -> bool:
    """Whether a .dockerignore leaves a file in: the last pattern that fits it, or a folder around it, decides."""
    visible = True
    for pattern in patterns:
        exception = pattern.startswith("!")
        if fits(path, pattern.removeprefix("!").strip("/")):
            visible = exception
    return visible


def fits(path: PurePosixPath, pattern: str) -> bool:
    around: Iterable[PurePosixPath] = (path, *path.parents[:-1])
    if pattern.startswith("**/"):
        return any(fnmatch.fnmatchcase(each.name, pattern.removeprefix("**/")) for each in around)
    return any(each.match(pattern) and len(each.parts) == pattern.count("/") + 1 for each in around)


def patterns_of(ignore_file: str) -> list[str]:
    """The patterns of a .dockerignore."""
    return [line.strip() for line in ignore_file.splitlines() if line.strip() and not line.startswith("#")]
