"""Renders the Helm chart: the few constructs of Go's templates that it uses, and refuses every other.

{{ .Values.a.b }}, {{ .Release.Name }}, {{ toYaml X }}, {{ add X 20 }}, | quote, | nindent 8
{{ if X }}, {{ if not X }}, {{ else }}, {{ end }}, with - where white space before or behind is dropped
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import yaml

ACTION = re.compile(r"(\s*\{\{-|\{\{)\s*(.*?)\s*(-\}\}\s*|\}\})", re.DOTALL)


def merged(values: dict[str, Any], own: dict[str, Any]) -> dict[str, Any]:
    """Values of the chart with some of one's own, as `helm --set` merges them."""
    found = dict(values)
    for name, value in own.items():
        found[name] = merged(found[name], value) if isinstance(found.get(name), dict) else value
    return found


def render(chart: Path, name: str, own: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """The objects of a release of this name."""
    values = merged(yaml.safe_load((chart / "values.yaml").read_text()), own)
    context = {"Values": values, "Release": {"Name": name}}
    for template in sorted((chart / "templates").glob("*.yaml")):
        for document in yaml.safe_load_all(fill(template.read_text(), context)):
            if document is not None:
                yield document


def fill(text: str, context: dict[str, Any]) -> str:
    """The text of a template."""
    out: list[str] = []
    shown = [True]  # of each `if` around here
    at = 0
    for action in ACTION.finditer(text):
        if all(shown):
            out.append(text[at : action.start()])
        at = action.end()
        word, _, rest = action[2].partition(" ")
        if word == "if":
            shown.append(bool(condition(rest, context)))
        elif word == "else" and not rest:
            shown[-1] = not shown[-1]
        elif word == "end" and not rest:
            shown.pop()
        elif all(shown):
            out.append(pipeline(action[2], context))
    assert shown == [True], "an if has no end"
    return "".join([*out, text[at:]])


def condition(text: str, context: dict[str, Any]) -> Any:
    return not value(text.removeprefix("not "), context) if text.startswith("not ") else value(text, context)


def pipeline(text: str, context: dict[str, Any]) -> str:
    """What an action prints."""
    first, *filters = [part.strip() for part in text.split("|")]
    function, *arguments = first.split()
    match function:
        case "toYaml":
            result: Any = yaml.safe_dump(value(arguments[0], context)).strip()
        case "add":
            result = sum(int(value(argument, context)) for argument in arguments)
        case _:
            assert not arguments, text
            result = value(function, context)
    for name in filters:
        if name == "quote":
            result = msgspec.json.encode(str(result)).decode()
        else:
            indent = " " * int(re.fullmatch(r"nindent (\d+)", name)[1])  # type: ignore[index]
            result = "\n" + "\n".join(indent + line for line in str(result).splitlines())
    return str(result)


def value(text: str, context: Any) -> Any:
    """A number, or what a path leads to; a path that leads nowhere is a mistake of the chart."""
    if text.isdecimal():
        return int(text)
    assert re.fullmatch(r"(\.\w+)+", text), f"not known here: {text}"
    for name in text.split(".")[1:]:
        context = context[name]
    return context
