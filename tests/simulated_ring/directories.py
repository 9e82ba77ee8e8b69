"""Directories of checkpoints, which somebody may write to at any time: a version names what was in one of them."""

from collections import Counter, defaultdict
from random import Random

from quartet.runtime.control import REWRITTEN
from tests.simulated_ring.faults import hold

FIRST_PATH, NEW_PATH = "model", "new"
SHARE = 0.4  # of the runs with several schedulers: files are rewritten in place
MOST_REWRITES = 3


def rewrites_of(seed: int) -> int:
    """How often a run has files rewritten."""
    random = Random(f"rewrites {seed}")
    return random.randint(1, MOST_REWRITES) if random.random() < SHARE else 0


class Directories:
    """What is in each directory, and which of it schedulers have computed with."""

    def __init__(self) -> None:
        self._rewrites: Counter[str] = Counter()
        self._computed_with: defaultdict[str, set[str]] = defaultdict(set)  # version → files

    @property
    def are_rewritten(self) -> bool:
        return bool(self._rewrites)

    def rewrite(self, path: str) -> None:
        self._rewrites[path] += 1

    def files(self, path: str) -> str:
        """As `Committed.weight_files` names what is there now."""
        return f"{path} {self._rewrites[path]}"

    def version(self, path: str, files: str, version: str) -> str:
        """As `record.restored` calls what is there now: `version`, where those files are still there."""
        return version if files == self.files(path) else REWRITTEN.format(version)

    def compute(self, version: str, files: str) -> None:
        """A scheduler computes with these files under this version."""
        self._computed_with[version].add(files)

    def check(self) -> None:
        """No version stands for two contents; what was rewritten has none of its own."""
        for version, files in self._computed_with.items():
            hold(len(files) == 1 or version.endswith(REWRITTEN.format("")), version, "is served with", files)
