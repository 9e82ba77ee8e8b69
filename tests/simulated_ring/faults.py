"""How a run says that something is wrong."""


class Fault(AssertionError):
    """The ring did what it must not do."""


def hold(condition: object, *said: object) -> None:
    if not condition:
        raise Fault(" ".join(map(str, said)))
