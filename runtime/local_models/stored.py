"""`quartet models`: the models of the hub's cache, their sizes and last use; `quartet models rm` removes some."""

import argparse
import difflib
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from quartet.runtime.client.arguments import parsed
from quartet.runtime.errors import UsageError
from quartet.runtime.local_models.arguments import models_parser
from quartet.runtime.local_models.sizes import ago, in_words
from quartet.runtime.log import plain, put, say

if TYPE_CHECKING:
    from huggingface_hub import CachedRepoInfo, HFCacheInfo

NEEDS_HUB = "the hub's cache is read with huggingface_hub: pip install 'quartet-serve[hub]'"


def main(argv: Sequence[str]) -> int:
    """List or remove; returns the exit status."""
    try:
        options = parsed(models_parser(), argv)
        if options.action == "rm":
            return remove(options)
        if options.model:
            raise UsageError(f"unexpected argument {options.model[0]!r}; models are removed by `quartet models rm`")
        for line in listed(models_in(scan(options)), time.time(), directory(options)):
            put(line)
        return 0
    except UsageError as error:
        say(f"quartet: {plain(str(error))}", sys.stderr)
        return 2


def directory(options: argparse.Namespace) -> Path:
    """Where models are kept. Raises UsageError without the library that knows."""
    try:
        from huggingface_hub import constants  # here, for it is slow and seldom needed
    except ImportError as error:
        raise UsageError(NEEDS_HUB) from error
    return Path(options.download_dir or constants.HF_HUB_CACHE)


def scan(options: argparse.Namespace) -> "HFCacheInfo | None":
    """The cache; None where there is none yet. Raises UsageError."""
    where = directory(options)
    from huggingface_hub import CacheNotFound, scan_cache_dir

    try:
        return scan_cache_dir(where)
    except CacheNotFound:
        return None
    except (OSError, ValueError) as error:
        raise UsageError(f"cannot read {where}: {error}") from error


def models_in(cache: "HFCacheInfo | None") -> "list[CachedRepoInfo]":
    """The models of a cache, the last used first."""
    repositories = [] if cache is None else [found for found in cache.repos if found.repo_type == "model"]
    return sorted(repositories, key=lambda found: (-found.last_accessed, found.repo_id))


def listed(models: "Sequence[CachedRepoInfo]", now: float, where: Path) -> list[str]:
    """A line for each model and one for the sum."""
    if not models:
        return [f"no models in {where}; `quartet pull OWNER/NAME` fetches one, and `quartet serve demo` needs none"]
    rows = [("model", "size", "last used")]
    rows += [(plain(one.repo_id), in_words(one.size_on_disk), ago(one.last_accessed, now)) for one in models]
    widths = [max(len(row[column]) for row in rows) for column in (0, 1)]
    total = in_words(sum(one.size_on_disk for one in models))
    lines = [f"{name:<{widths[0]}}  {size:>{widths[1]}}  {used}" for name, size, used in rows]
    return [*lines, f"{len(models)} model{'s' * (len(models) != 1)}, {total} in {where}"]


def remove(options: argparse.Namespace) -> int:
    """Remove models after asking. Raises UsageError."""
    if not options.model:
        raise UsageError("say which model to remove: quartet models rm OWNER/NAME; `quartet models` lists them")
    known = {found.repo_id: found for found in models_in(scan(options))}
    if missing := next((name for name in options.model if name not in known), None):
        near = difflib.get_close_matches(missing, known, n=1)
        raise UsageError(f"no model {missing} in {directory(options)}" + (f"; did you mean {near[0]}?" if near else ""))
    chosen = [known[name] for name in dict.fromkeys(options.model)]
    freed = in_words(sum(one.size_on_disk for one in chosen))
    names = plain(", ".join(one.repo_id for one in chosen))
    if not options.yes and not agreed(f"Remove {names} ({freed})? [y/N] "):
        put("nothing was removed")
        return 1
    try:
        for one in chosen:  # not by revisions: a download that was broken off has none
            shutil.rmtree(one.repo_path)
    except OSError as error:
        raise UsageError(f"cannot remove {names}: {error}") from error
    put(f"removed {names}: {freed} freed")
    return 0


def agreed(question: str) -> bool:
    """Ask at the terminal. Raises UsageError where nobody can be asked."""
    if not sys.stdin.isatty():
        raise UsageError("nobody can be asked here; --yes removes without asking")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False
