"""A service with a bug that shows before it is ready."""

from quartet.runtime.service import Boot, run


def main(boot: Boot) -> None:
    raise ZeroDivisionError("a bug of the stand-in")


if __name__ == "__main__":
    run(main)
