"""The families of reasoning parsers, by their `--reasoning-parser` names. `output_reader` does the reading."""

from typing import NamedTuple

from quartet.http_gateway.parsers.output_reader import OutputReader
from quartet.http_gateway.parsers.thoughts import ANALYSIS, BRACKETS, GRANITE, QWEN3, Family, Marks
from quartet.http_gateway.parsers.tool_events import collect
from quartet.runtime.errors import RequestError

FAMILIES = {
    "deepseek-r1": Family(place="inside"),
    "deepseek-v3": Family(),
    "glm45": Family(),
    "kimi": Family(Marks("◁think▷", "◁/think▷")),
    "qwen3": Family(QWEN3),
    "qwen3-thinking": Family(QWEN3, place="inside"),
    "step3": Family(place="inside"),
    "gpt-oss": Family(ANALYSIS),
    "granite": Family(GRANITE),
    "kimi_k2": Family(),
    "minimax": Family(),
    "mistral": Family(BRACKETS),
}
CLUES = {  # what a chat template holds → a family that waits for its opening tag: no answer is taken for a thought
    r"<\|channel\|>": "gpt-oss",
    r"\[THINK\]": "mistral",
    r"◁/?think▷": "kimi",
    r"<think>|</think>": "qwen3",
    r"Here is my thought process:": "granite",
}


class Split(NamedTuple):
    """A whole output in its parts."""

    reasoning: str = ""
    content: str = ""


def family(name: str) -> Family:
    """Raises RequestError."""
    if name not in FAMILIES:
        raise RequestError(
            f"Unsupported reasoning parser {name!r}, use one of: {', '.join(FAMILIES)}.", field="reasoning_parser"
        )
    return FAMILIES[name]


def split(name: str, text: str) -> Split:
    """Thought and answer of a whole output."""
    found = family(name)
    reading = OutputReader(found.marks, found.place)
    whole = collect([*reading.feed(text), *reading.finish()])
    return Split(whole.thought, whole.content)
