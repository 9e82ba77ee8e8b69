"""How families of models mark their thought, and where an output begins: one declaration each."""

from dataclasses import dataclass

from quartet.runtime.messages import Place


@dataclass(frozen=True)
class Marks:
    """What opens and what closes a thought."""

    opening: str = "<think>"
    closing: str = "</think>"


@dataclass(frozen=True)
class Family:
    """How one family of models thinks."""

    marks: Marks = Marks()
    place: Place = "before"  # where the output begins, if the prompt does not show it
