"""Compiles the patterns of `stop_regex`: RE2, so that matching takes linear time whatever a client writes."""

from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import re2

from quartet.runtime import limits
from quartet.runtime.errors import RequestError


@lru_cache(maxsize=256)
def compile_stop(pattern: str, memory: int = limits.MAX_STOP_REGEX_MEMORY) -> Any:
    """The compiled pattern. Raises RequestError (400) naming stop_regex when it is not RE2 or would be too large."""
    options = re2.Options()
    options.max_mem = memory
    options.log_errors = False
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        cause = error.args[0].decode(errors="replace") if isinstance(error.args[0], bytes) else str(error)
        raise RequestError(f"stop_regex {pattern!r} does not compile: {cause}.", field="stop_regex") from error


def check_stops(patterns: Iterable[str]) -> None:
    """Raise RequestError (400) where a pattern does not compile, or all together are too large to be looked for."""
    size = sum(compile_stop(pattern).programsize for pattern in patterns)
    if size > limits.MAX_STOP_REGEX_PROGRAM:
        raise RequestError(
            f"The patterns of stop_regex are too large together: {size} steps, {limits.MAX_STOP_REGEX_PROGRAM} are "
            "allowed. Counted repetitions such as (a{30}){30} take as many steps as they repeat.",
            field="stop_regex",
        )
