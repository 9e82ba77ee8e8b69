"""Calls that a small model writes without the tags of its template: the answer is JSON, alone or in a block of code.

So that no answer is taken for a call by mistake, all of it must be calls, each of a tool of the request, with arguments
that fit the tool and nothing beside them. An answer is held back as long as it may turn out to be such; any other is
passed on from the character that shows it.
"""

import json
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from quartet.http_gateway.parsers.json_calls import ARGUMENTS, JsonCall
from quartet.http_gateway.parsers.pythonic_calls import as_json
from quartet.http_gateway.parsers.tag_search import blanks_end
from quartet.http_gateway.parsers.tagged_calls import kinds_of
from quartet.http_gateway.parsers.tool_events import CALL, Call, CallStart, Content, Event, Events
from quartet.http_gateway.parsers.tool_events import Arguments as ArgumentsEvent

LEADS = tuple(fence + bracket + "{" for fence in ("", "```json", "```") for bracket in ("", "["))  # without blanks
BEHIND = ",;{]`"  # what may follow a call, but for blanks
FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)
BETWEEN = re.compile(r"\s*[,;]?\s*")
KINDS: dict[type, set[str]] = {
    str: {"string"},
    bool: {"boolean"},
    int: {"integer", "number"},
    float: {"number"},
    list: {"array"},
    dict: {"object"},
    type(None): {"null"},
}


class UntaggedCalls:
    """Reads the events of one output, and tells calls where its content is nothing else."""

    def __init__(self, known: Collection[str], schemas: Mapping[str, Any]) -> None:
        """`schemas`: of the parameters, by the tool's name."""
        self._known = known
        self._schemas = schemas
        self._held: list[str] | None = []  # None: it is no such answer
        self._lead = ""
        self._object: JsonCall | None = None
        self._between = False  # behind a whole object

    def read(self, events: Iterable[Event], last: bool) -> list[Event]:
        """The events that are decided with these; `last`: no more will come."""
        made: list[Event] = []
        for event in events:
            if self._held is not None and isinstance(event, Content):
                self._held.append(event.text)
                if self._may_be_calls(event.text):
                    continue
                made += self._as_text()
            else:
                made += [*self._as_text(), event]
                self._held = None if isinstance(event, CallStart) else self._held  # this model does write tags
        if last and self._held:
            text = "".join(self._held)
            calls = calls_of(text, self._known, self._schemas)
            made += told(calls) if calls else [Content(text)]
            self._held = None
        return made

    def _as_text(self) -> list[Event]:
        """What was held back; a thought may come before anything is."""
        if not self._held:
            return []
        text, self._held = "".join(self._held), None
        return [Content(text)]

    def _may_be_calls(self, text: str) -> bool:
        """Whether all that was held back, of which this is the end, may be the beginning of calls."""
        at = 0
        while at < len(text):
            if self._object is not None:
                at = self._object.take(text, at)
                if self._object.outcome is not None:
                    self._between = self._object.outcome == CALL
                    self._object = None
                    if not self._between:
                        return False
            elif solid := blanks_end(text, at):
                at = solid
            elif text[at] == "{" and (self._between or self._lead + "{" in LEADS):
                self._object, self._between = JsonCall(self._known, Events(), ""), False
            elif self._between:
                if text[at] not in BEHIND:
                    return False
                at += 1
            else:
                self._lead += text[at]
                if not any(lead.startswith(self._lead) for lead in LEADS):
                    return False
                at += 1
        return True


def told(calls: Iterable[Call]) -> list[Event]:
    events: list[Event] = []
    for index, call in enumerate(calls):
        events += [CallStart(index, call.name), ArgumentsEvent(index, call.arguments)]
    return events


def calls_of(text: str, known: Collection[str], schemas: Mapping[str, Any]) -> list[Call]:
    """The calls that a text is, if it is nothing else."""
    fenced = FENCED.fullmatch(text.strip())
    try:
        objects = objects_of(fenced[1] if fenced else text.strip())
    except (ValueError, RecursionError):
        return []
    calls = [call_of(given, known, schemas) for given in objects]
    whole = [call for call in calls if call is not None]
    return whole if len(whole) == len(calls) else []


def objects_of(text: str) -> list[Any]:
    """The values of a list, or those that stand behind each other. Raises ValueError where there is anything else."""
    decoder = json.JSONDecoder(strict=False)
    if text.startswith("["):
        listed = decoder.decode(text)
        return listed if isinstance(listed, list) else []
    found, at = [], 0
    while at < len(text):
        value, at = decoder.raw_decode(text, at)
        found.append(value)
        between = BETWEEN.match(text, at)
        at = between.end() if between else at
    return found


def call_of(given: Any, known: Collection[str], schemas: Mapping[str, Any]) -> Call | None:
    """The call that a value describes, if it does nothing else."""
    if not isinstance(given, dict) or len(given) != 2 or not isinstance(name := given.get("name"), str):
        return None
    arguments = next((given[key] for key in ARGUMENTS if key in given), None)
    if name not in known or not isinstance(arguments, dict) or not fits(arguments, schemas.get(name)):
        return None
    text = as_json(lambda: arguments)  # Python reads more than JSON has: NaN, numbers without end, half characters
    return None if text is None else Call(name, text)


def fits(arguments: Mapping[str, Any], schema: Any) -> bool:
    """Whether arguments have the names and the types that a schema says, and all that it requires."""
    schema = schema if isinstance(schema, dict) else {}
    properties = schema.get("properties")
    properties = properties if isinstance(properties, dict) else {}
    required = schema.get("required")
    if isinstance(required, list) and not all(name in arguments for name in required if isinstance(name, str)):
        return False
    return all(name in properties and is_of(value, properties[name]) for name, value in arguments.items())


def is_of(value: Any, schema: Any) -> bool:
    """Whether a value has a type that a schema names, and is one of those that it lists."""
    kinds, listed = kinds_of(schema), schema.get("enum") if isinstance(schema, dict) else None
    if isinstance(listed, list) and value not in listed:
        return False
    own = KINDS[type(value)] | ({"integer"} if isinstance(value, float) and value.is_integer() else set())
    return not kinds or bool(kinds & own)
