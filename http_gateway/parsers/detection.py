"""Which formats of tool calls and thoughts a model uses: as the flags say, or by its chat template and its type.

A guess must do no harm: a family of thoughts is chosen by its tags alone, which the output must begin with unless the
prompt opens the thought; a format of calls is looked for only where a request has tools.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import msgspec

from quartet.http_gateway.parsers import call_formats, reasoning
from quartet.runtime.config import ResolvedConfig
from quartet.runtime.model_files.model_info import ModelInfo

TOOLS = re.compile(r"\{[{%][^{}]{0,500}?\b(xml_)?tool(s|_calls)\b")  # in the template's code, not in its prose


class Choice(NamedTuple):
    """A parser's name, None for none, and why it was chosen."""

    name: str | None
    reason: str

    def __str__(self) -> str:
        return f"{self.name or 'none'} ({self.reason})"


class Formats(NamedTuple):
    """The two choices; as text, the line for the log."""

    calls: Choice
    thoughts: Choice

    def __str__(self) -> str:
        return f"Tool call parser: {self.calls}; reasoning parser: {self.thoughts}"

    def applied(self, config: ResolvedConfig) -> ResolvedConfig:
        """The configuration with the parsers that serve; None where there is none."""
        return msgspec.structs.replace(config, tool_call_parser=self.calls.name, reasoning_parser=self.thoughts.name)


def detect(config: ResolvedConfig, model: ModelInfo, templates: Mapping[str, str]) -> Formats:
    """The formats of the served model. `templates`: the sources of its chat templates by name."""
    return Formats(
        given(config.tool_call_parser, "--tool-call-parser") or detect_calls(templates, model.model_type),
        given(config.reasoning_parser, "--reasoning-parser") or detect_thoughts(templates),
    )


def given(value: str | None, flag: str) -> Choice | None:
    """What the flag says; None where it leaves the choice to us."""
    return None if value == "auto" else Choice(None if value == "none" else value, f"by {flag}")


def detect_calls(templates: Mapping[str, str], model_type: str) -> Choice:
    """The format of calls that the template for conversations with tools shows."""
    source = templates.get("tool_use") or templates.get("default")
    if source is None:
        return Choice(None, "no chat template")
    if not TOOLS.search(source):
        return Choice(None, "the chat template takes no tools")
    if found := find_clue(call_formats.CLUES, source):
        return found
    if model_type in call_formats.MODEL_TYPES:
        return Choice(call_formats.MODEL_TYPES[model_type], f"model type {model_type}")
    return Choice(None, "the chat template shows no known format")


def detect_thoughts(templates: Mapping[str, str]) -> Choice:
    """The family of thoughts whose tags the template holds."""
    if "default" not in templates:
        return Choice(None, "no chat template")
    found = find_clue(reasoning.CLUES, templates["default"])
    return found or Choice(None, "the chat template has no tags of thoughts")


def find_clue(clues: Mapping[str, str], source: str) -> Choice | None:
    """The name beside the first pattern that the source holds."""
    for pattern, name in clues.items():
        if match := re.search(pattern, source):
            return Choice(name, f"the chat template has {match[0]}")
    return None
