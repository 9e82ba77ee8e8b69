"""Structural tags: JSON that describes an output made of fixed texts, free text and parts with a grammar of their own.

    {"format": {"type": "tag", "begin": "<a>", "content": {"type": "any_text"}, "end": "</a>"}}

The form before that had `structures` and `triggers`; it means a format of triggered tags. Every function raises
ValueError with a message that is safe to show.
"""

import json
from typing import Any, Literal

import msgspec
from llguidance import LLMatcher, regex_to_lark

from quartet.runtime import limits
from quartet.scheduler_service.grammar.checked_schema import checked_schema
from quartet.scheduler_service.grammar.lark import ANY_TEXT, SpecialTokens, literal, split_at_tokens
from quartet.scheduler_service.grammar.regex_size import check_regex

MOST_REPEATS = 1000
NO_END = "free text must end its tag, stand before a const_string or a tag, or end the output"


class Format(msgspec.Struct, tag_field="type", forbid_unknown_fields=True):
    """A part of the output."""


class ConstString(Format, tag="const_string"):
    value: str


class JsonSchema(Format, tag="json_schema"):
    json_schema: dict[str, Any] | bool
    style: Literal["json"] = "json"
    any_order: bool = False


class Regex(Format, tag="regex"):
    pattern: str


class AnyText(Format, tag="any_text"):
    excludes: list[str] = []
    max_tokens: None = None
    max_chars: None = None


class Sequence(Format, tag="sequence"):
    elements: "list[AnyFormat]"


class Or(Format, tag="or"):
    elements: "list[AnyFormat]"


class Optional(Format, tag="optional"):
    content: "AnyFormat"


class Star(Format, tag="star"):
    content: "AnyFormat"


class Plus(Format, tag="plus"):
    content: "AnyFormat"


class Repeat(Format, tag="repeat"):
    min: int
    max: int  # -1: no end
    content: "AnyFormat"


class Tag(Format, tag="tag"):
    begin: str
    content: "AnyFormat"
    end: str | list[str]

    @property
    def ends(self) -> list[str]:
        ends = [self.end] if isinstance(self.end, str) else self.end
        return [end for end in ends if end]


class TriggeredTags(Format, tag="triggered_tags"):
    triggers: list[str]
    tags: list[Tag]
    at_least_one: bool = False
    stop_after_first: bool = False
    excludes: list[str] = []


class TagsWithSeparator(Format, tag="tags_with_separator"):
    tags: list[Tag]
    separator: str
    at_least_one: bool = False
    stop_after_first: bool = False


AnyFormat = (
    ConstString
    | JsonSchema
    | Regex
    | AnyText
    | Sequence
    | Or
    | Optional
    | Star
    | Plus
    | Repeat
    | Tag
    | TriggeredTags
    | TagsWithSeparator
)


class StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    """The current form."""

    format: AnyFormat
    type: str = "structural_tag"


class Structure(msgspec.Struct):
    begin: str
    schema: dict[str, Any]
    end: str = ""


class Structures(msgspec.Struct, forbid_unknown_fields=True):
    """The form before."""

    structures: list[Structure]
    triggers: list[str]
    type: str = "structural_tag"


def from_structural_tag(text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a structural tag in either form."""
    given = msgspec.json.decode(text, type=dict[str, msgspec.Raw])
    if "format" in given and not given.keys().isdisjoint(("structures", "triggers")):
        raise ValueError("structural_tag takes a format, or structures and triggers")
    if "format" in given:
        outermost = msgspec.json.decode(text, type=StructuralTag).format
    else:
        outermost = _current_form(msgspec.json.decode(text, type=Structures))
    writer = Writer(special_tokens)
    start = writer.expression(outermost, [], last=True)
    return LLMatcher.grammar_from_lark("\n".join(["%llguidance {}", f"start: {start}", *writer.lines]) + "\n")


def _current_form(tag: Structures) -> TriggeredTags:
    if not tag.structures:
        raise ValueError("structural_tag needs at least one structure")
    return TriggeredTags(tag.triggers, [Tag(one.begin, JsonSchema(one.schema), one.end) for one in tag.structures])


class Writer:
    """Writes the rules of a Lark grammar."""

    def __init__(self, special_tokens: SpecialTokens) -> None:
        self.lines: list[str] = []
        self._special_tokens = special_tokens

    def expression(self, given: AnyFormat, ends: list[str], last: bool = False) -> str:
        """A format and, behind it, one of the texts `ends`, if there are any. `last`: it may end the output."""
        match given:
            case AnyText(excludes):
                return self._text(excludes, ends, last)
            case TriggeredTags():
                return self._triggered(given, ends, last)
            case Sequence(elements):
                return self._sequence(elements, ends, last)
            case Or(elements):
                return self._any_of([self.expression(element, ends, last) for element in elements])
        return f"{self._bounded(given)} {self._one_of(ends)}"

    def _bounded(self, given: AnyFormat) -> str:
        """A format that knows by itself where it ends."""
        match given:
            case ConstString(value):
                if not value:
                    raise ValueError("a const_string needs a value")
                return self._literal(value)
            case JsonSchema():
                return _json(given)
            case Regex(pattern):
                check_regex(pattern)
                return self._rule(f"/{regex_to_lark(pattern, 'dws')}/", terminal=True)
            case Tag():
                return f"{self._literal(given.begin)} {self._rest(given, given.begin)}"
            case Optional(content):
                return f"({self.expression(content, [])})?"
            case Star(content):
                return f"({self.expression(content, [])})*"
            case Plus(content):
                return f"({self.expression(content, [])})+"
            case Repeat(least, most, content):
                return f"({self.expression(content, [])}){_count(least, most)}"
            case TagsWithSeparator():
                return self._separated(given)
        raise AssertionError(given)

    def _rest(self, tag: Tag, known: str) -> str:
        """What follows the text `known`, with which a tag begins."""
        return f"{self._literal(tag.begin.removeprefix(known))} {self._rule(self.expression(tag.content, tag.ends))}"

    def _sequence(self, elements: "list[AnyFormat]", ends: list[str], last: bool) -> str:
        """One after the other. Free text among them goes up to the fixed text that begins the next."""
        if not elements:
            raise ValueError("a sequence needs at least one element")
        parts, opened = [], ""
        for index, element in enumerate(elements):
            final = index == len(elements) - 1
            following = ends if final else []
            if not final and isinstance(element, AnyText | TriggeredTags):
                following = [_opening(elements[index + 1])]
            if opened:
                parts.append(self._without_opening(element, following))
            else:
                parts.append(self.expression(element, following, last and final))
            opened = "" if final or not following else following[0]
        return " ".join(parts)

    def _without_opening(self, element: AnyFormat, ends: list[str]) -> str:
        """A const_string or a tag whose fixed beginning was written already."""
        rest = self._rest(element, element.begin) if isinstance(element, Tag) else ""
        return f"{rest} {self._one_of(ends)}"

    def _text(self, excludes: list[str], ends: list[str], last: bool) -> str:
        """Free text up to the first of `ends`; without any, to the end of the output."""
        if not ends and not last:
            raise ValueError(NO_END)
        text = self._free(excludes)
        return self._any_of([self._up_to(text, end) for end in ends]) if ends else text

    def _up_to(self, text: str, end: str) -> str:
        """Free text and the first occurrence of a fixed one behind it."""
        before, *behind = split_at_tokens(end, self._special_tokens)
        if before in self._special_tokens:
            return f"{text} {self._literal(end)}"
        if not behind:
            return self._rule(f"{text} {json.dumps(end)}", lazy=True)
        return f"{self._rule(f'{text} {json.dumps(before)}', terminal=True)} {self._literal(''.join(behind))}"

    def _triggered(self, given: TriggeredTags, ends: list[str], last: bool) -> str:
        """Free text in which each trigger begins one of its tags."""
        if not given.tags:
            raise ValueError("triggered_tags needs at least one tag")
        by_trigger: dict[str, list[Tag]] = {}
        for tag in given.tags:
            trigger = next((t for t in given.triggers if t and tag.begin.startswith(t)), None)
            if trigger is None:
                raise ValueError(f"the begin {tag.begin!r} starts with none of the triggers")
            by_trigger.setdefault(trigger, []).append(tag)
        text, branches = self._free(given.excludes), []
        for trigger, tags in by_trigger.items():
            rests = self._any_of([self._rest(tag, trigger) for tag in tags])
            branches.append(f"{self._up_to(text, trigger)} {rests}")
        more = self._rule(" | ".join(branches))
        tail = self._text(given.excludes, ends, last)
        if given.at_least_one:
            first = self._any_of([self._bounded(tag) for tag in given.tags])
            return f"{first} {self._one_of(ends) if given.stop_after_first else f'{more}* {tail}'}"
        return f"({more} {self._one_of(ends)} | {tail})" if given.stop_after_first else f"{more}* {tail}"

    def _separated(self, given: TagsWithSeparator) -> str:
        """Tags and nothing else, with a fixed text between two of them."""
        if not given.tags:
            raise ValueError("tags_with_separator needs at least one tag")
        one = self._rule(" | ".join(self._bounded(tag) for tag in given.tags))
        more = "" if given.stop_after_first else f" ({self._literal(given.separator)} {one})*"
        return f"{one}{more}" if given.at_least_one else f"({one}{more})?"

    def _free(self, excludes: list[str]) -> str:
        """The terminal of text in which none of some texts occurs."""
        without = [f"~/(.|\\n)*{_escaped(text)}(.|\\n)*/" for text in excludes if text]
        return self._rule(" & ".join([ANY_TEXT, *without]), terminal=True)

    def _literal(self, text: str) -> str:
        return literal(text, self._special_tokens)

    def _one_of(self, texts: list[str]) -> str:
        return self._any_of([self._literal(text) for text in texts]) if texts else ""

    def _any_of(self, expressions: list[str]) -> str:
        if not expressions:
            raise ValueError("an or needs at least one element")
        return expressions[0] if len(expressions) == 1 else f"({' | '.join(expressions)})"

    def _rule(self, body: str, terminal: bool = False, lazy: bool = False) -> str:
        """The name of a new rule."""
        if len(self.lines) >= limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"it has more than {limits.MAX_GRAMMAR_NODES} parts")
        name = f"{'T' if terminal else 'r'}{len(self.lines)}"
        self.lines.append(f"{name}{'[lazy]' if lazy else ''}: {body}")
        return name


def _opening(element: AnyFormat) -> str:
    """The fixed text that a format begins with."""
    opening = element.value if isinstance(element, ConstString) else element.begin if isinstance(element, Tag) else ""
    if not opening:
        raise ValueError(NO_END)
    return opening


def _json(given: JsonSchema) -> str:
    if given.any_order:
        raise ValueError("any_order is not supported")
    schema = {} if given.json_schema is True else given.json_schema
    return f"%json {json.dumps(checked_schema(json.dumps(schema)))}"


def _count(least: int, most: int) -> str:
    if not 0 <= least <= (least if most == -1 else most) <= MOST_REPEATS:
        raise ValueError(f"repeat takes 0 <= min <= max <= {MOST_REPEATS}, or a max of -1")
    return f"{{{least},}}" if most == -1 else f"{{{least},{most}}}"


def _escaped(text: str) -> str:
    """A fixed text in a regular expression between slashes."""
    return "".join(character if character.isalnum() else f"\\x{{{ord(character):x}}}" for character in text)
