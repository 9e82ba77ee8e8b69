"""Which version of Quartet this is."""

from importlib import metadata


def version() -> str:
    """The installed one; a source tree that was never installed has none."""
    try:
        return metadata.version("quartet-serve")
    except metadata.PackageNotFoundError:
        return "0+source"
