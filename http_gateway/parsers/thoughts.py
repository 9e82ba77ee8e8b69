"""How families of models mark their thought, and where an output begins: one declaration each."""

from dataclasses import dataclass

from quartet.http_gateway.parsers.channels import HARMONY, Channels
from quartet.runtime.messages import Place


@dataclass(frozen=True)
class Marks:
    """What opens and what closes a thought."""

    opening: str = "<think>"
    closing: str = "</think>"
    anywhere: bool = False  # also amid the answer: the tags are tokens of their own that nothing else can spell
    call_ends: bool = False  # a call in a thought ends it: these models forget the closing tag, as SGLang knows
    channels: Channels | None = None  # the tags are heads and ends of messages


THINK = Marks()
QWEN3 = Marks(call_ends=True)
BRACKETS = Marks("[THINK]", "[/THINK]", anywhere=True)
GRANITE = Marks("Here is my thought process:", "Here is my response:")
ANALYSIS = Marks("<|channel|>analysis<|message|>", "<|end|>", channels=HARMONY)


@dataclass(frozen=True)
class Family:
    """How one family of models thinks."""

    marks: Marks = THINK
    place: Place = "before"  # where the output begins, if the prompt does not show it
