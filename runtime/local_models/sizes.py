"""Sizes of files and moments, in words."""

import time
from pathlib import Path

UNITS = ("B", "kB", "MB", "GB", "TB")
STEPS = ((60, "minute"), (60, "hour"), (24, "day"))
MOST_DAYS = 60


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory; links count as what they lead to."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def in_words(size: int) -> str:
    """Three digits that count, in powers of 1000, as the hub shows sizes."""
    value, unit = float(size), 0
    while value >= 999.5 and unit < len(UNITS) - 1:
        value, unit = value / 1000, unit + 1
    digits = 0 if unit == 0 or value >= 100 else 1
    return f"{value:.{digits}f} {UNITS[unit]}"


def ago(moment: float, now: float) -> str:
    """How long a moment is past: minutes, hours, days; long ago as a date."""
    passed = max(0.0, now - moment) / 60
    if passed < 1:
        return "just now"
    for (_, unit), (most, _) in zip(STEPS, (*STEPS[1:], (MOST_DAYS, "")), strict=True):
        if passed < most:
            count = int(passed)
            return f"{count} {unit}{'s' * (count != 1)} ago"
        passed /= most
    return time.strftime("%Y-%m-%d", time.localtime(moment))
