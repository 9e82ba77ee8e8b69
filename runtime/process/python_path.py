"""Where child processes find our packages: where this process has found them."""

import os
from collections.abc import Mapping
from pathlib import Path

import quartet

IMPORT_ROOT = Path(quartet.__file__).resolve().parents[1]


def python_path(environment: Mapping[str, str]) -> str:
    """PYTHONPATH for a child process: our import root before what the environment has."""
    return os.pathsep.join([str(IMPORT_ROOT), *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))])
