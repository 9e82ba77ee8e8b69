"""A service that cannot start, and says why."""

from quartet.runtime.errors import StartupError
from quartet.runtime.service import Boot, run


def main(boot: Boot) -> None:
    raise StartupError("no weights in this directory; pass another --model-path")


if __name__ == "__main__":
    run(main)
