"""Grammars of tool calls as the model itself writes them: JSON, Python, or parameters between tags.

Arguments in JSON are the engine's business. Others are written here: the parameters in the order of the schema, the
optional ones or not, each value by its own schema. Every function raises ValueError.
"""

import json
from collections.abc import Collection, Iterator
from typing import Any, NamedTuple

import msgspec
from llguidance import LLMatcher

from quartet.runtime.call_grammar import CallGrammar, CallRule, ValueTags
from quartet.runtime.messages import Thought
from quartet.scheduler_service.grammar.arguments import Parameter, alternatives
from quartet.scheduler_service.grammar.call_values import VALUE_RULES, python_value, tagged_value
from quartet.scheduler_service.grammar.checked_schema import checked_schema
from quartet.scheduler_service.grammar.lark import SpecialTokens, literal, split_at_tokens
from quartet.scheduler_service.grammar.source import split_thought, thought_rules
from quartet.scheduler_service.grammar.text_values import READ_AS, named_types, options

TEXT = r"TEXT: /(.|\n)*/"
FREE_NAME = "FREE_NAME: /[A-Za-z_][A-Za-z0-9_]{0,63}/"  # of a parameter that the schema does not declare
MARKS = {"number": "NUMBER: /[0-9]{1,4}/", "id": "ID: /[A-Za-z0-9]{9}/"}  # of a call, behind its name


def from_calls(text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a CallGrammar in JSON, after a thought where the text says so."""
    thought, text = split_thought(text)
    calls = msgspec.json.decode(text, type=CallGrammar)
    start, rules = (Demanded if not calls.trigger else Triggered)(calls, special_tokens).whole(thought)
    lines = ["%llguidance {}", f"start: {start}", *dict.fromkeys(rules)]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


class Form(NamedTuple):
    """One way to write the value of a parameter: what stands before it, its rule, and the rules that are new."""

    middle: str
    value: str
    rules: list[str]


class Demanded:
    """Nothing but calls behind the thought."""

    def __init__(self, calls: CallGrammar, special_tokens: SpecialTokens) -> None:
        self.calls = calls
        self.special_tokens = special_tokens
        self._shared: dict[str, str] = {}  # what a value may be → the rule for it, of all tools

    def whole(self, thought: Thought | None) -> tuple[str, list[str]]:
        """The start, and the rules that it needs."""
        before, rules = self.thought_rules(thought) if thought else ("", [])
        return f"{before} calls", [*rules, *self.call_rules()]

    def thought_rules(self, thought: Thought) -> tuple[str, list[str]]:
        return thought_rules(thought, self.special_tokens, self.calls.behind_thought)

    def text(self, fixed: str) -> str:
        return literal(fixed, self.special_tokens)

    def call_rules(self) -> Iterator[str]:
        """The rules for `calls`: the first one with what stands before it, others, and what stands behind them."""
        calls, count = self.calls, range(len(self.calls.calls))
        more = "" if calls.single else "next*"
        yield f"calls: first {more} {self.text(calls.after)} {self.blanks()}"
        yield "first: " + " | ".join(f"first{index}" for index in count)
        if not calls.single:
            yield "next: " + " | ".join(f"next{index}" for index in count)
        for index, rule in enumerate(calls.calls):
            end = f"arguments{index} {self.text(rule.end)}"
            yield f"first{index}: {self.head((calls.before + rule.begin).removeprefix(calls.trigger), rule)} {end}"
            if not calls.single:
                yield f"next{index}: {self.head(calls.separator + rule.begin, rule)} {end}"
            yield from self.arguments(f"arguments{index}", rule)
        if calls.marked:
            yield MARKS[calls.marked]

    def blanks(self) -> str:
        """Blanks that may stand behind the last of several calls, where they stand between calls.

        Models write them before they end. Without them, the blanks that a model wants would lead to another call.
        """
        calls = self.calls
        blanks = calls.separator.removesuffix(calls.separator.lstrip())
        return f"({self.text(blanks)})?" if blanks and not (calls.single or calls.after or calls.trigger) else ""

    def head(self, begin: str, rule: CallRule) -> str:
        """What stands before the arguments. One literal where possible: the engine takes the longest of several."""
        if marked := self.calls.marked:
            return f"{self.text(begin + self.calls.mark)} {marked.upper()} {self.text(rule.middle)}"
        return self.text(begin + rule.middle)

    def arguments(self, name: str, rule: CallRule) -> Iterator[str]:
        """The rules for the arguments of one tool."""
        schema = checked_schema(json.dumps({"type": "object", **rule.parameters}))
        if self.calls.body == "json":
            yield f"{name}: %json {json.dumps(schema)}"
            return
        options = alternatives(schema)
        yield f"{name}: " + " | ".join(f"{name}_{option}" for option in range(len(options)))
        for option, parameters in enumerate(options):
            write = self.in_python if self.calls.body == "python" else self.between_tags
            yield from write(f"{name}_{option}", parameters, set(rule.raw))
        yield from VALUE_RULES

    def shared(self, content: str) -> tuple[str, bool]:
        """The name of the rule for values of this content, and whether it is still to be written."""
        new = content not in self._shared
        return self._shared.setdefault(content, f"value{len(self._shared)}"), new

    def between_tags(self, name: str, parameters: list[Parameter], raw: set[str]) -> Iterator[str]:
        """One parameter behind the other; a parameter without a name may be any, and any number of them."""
        tags = self.calls.tags
        assert tags is not None
        parts = []
        writable = [parameter for parameter in parameters if can_name(parameter.name, tags)]
        if refused := next((p for p in parameters if p.required and p not in writable), None):
            raise ValueError(f"the parameter {refused.name!r} cannot be written in the model's format of calls")
        for index, parameter in enumerate(writable):
            rule = f"{name}_p{index}"
            forms = self.forms(parameter, parameter.name in raw)
            yield f"{rule}: " + " | ".join(self.key(parameter, form) + f" {form.value}" for form in forms)
            for form in forms:
                yield from form.rules
            parts.append(rule + ("*" if parameter.name is None else "" if parameter.required else "?"))
        yield f"{name}: " + (" ".join(parts) or '""')
        yield FREE_NAME

    def forms(self, parameter: Parameter, raw: bool) -> list["Form"]:
        """How a parameter's value may be written: in one way, or, where a tag tells text from JSON, in two."""
        tags = self.calls.tags
        assert tags is not None
        if not (tags.text_middle and raw):
            return [self.form(parameter, tags.middle, raw)]
        found = [self.form(only(parameter, {"string"}), tags.text_middle, True)]
        if named_types(options(parameter.schema)):
            found.append(self.form(only(parameter, READ_AS.keys()), tags.middle, False))
        return found

    def form(self, parameter: Parameter, middle: str, raw: bool) -> "Form":
        value, new = self.shared(f"{raw} {json.dumps(parameter.schema)}")
        if not new:
            return Form(middle, value, [])
        assert self.calls.tags is not None
        written, rules = tagged_value(value, parameter, self.calls.tags, raw, self.special_tokens)
        return Form(middle, value, [f"{value}: {written} {self.text(chr(10))}", *rules])

    def key(self, parameter: Parameter, form: "Form") -> str:
        """The tags and the name before a value."""
        assert self.calls.tags is not None
        if parameter.name is None:
            return f"{self.text(self.calls.tags.begin)} FREE_NAME {self.text(form.middle)}"
        return self.text(self.calls.tags.begin + parameter.name + form.middle)

    def in_python(self, name: str, parameters: list[Parameter], raw: set[str]) -> Iterator[str]:
        """`key=value, key=value`; `_0` of a rule: nothing stands before, `_1`: a comma is due."""
        named = [parameter for parameter in parameters if parameter.name is not None]
        for parameter in named:
            if not str(parameter.name).isidentifier() and parameter.required:
                raise ValueError(f"the parameter {parameter.name!r} cannot be written in Python")
        named = [parameter for parameter in named if str(parameter.name).isidentifier()]
        yield f"{name}: {name}_r0_0"
        for index, parameter in enumerate(named):
            value, new = self.shared(json.dumps(parameter.schema))
            if new:
                yield f"{value}: {python_value(parameter.schema)}"
            for comma in (0, 1):
                written = f"{json.dumps(', ' * comma + str(parameter.name) + '=')} {value} {name}_r{index + 1}_1"
                skipped = "" if parameter.required else f" | {name}_r{index + 1}_{comma}"
                yield f"{name}_r{index}_{comma}: {written}{skipped}"
        for comma in (0, 1):
            yield f'{name}_r{len(named)}_{comma}: ""'


def only(parameter: Parameter, kinds: Collection[str]) -> Parameter:
    """The parameter with those of its values that have one of these types."""
    whole: dict[str, Any] = {key: parameter.schema[key] for key in ("$defs", "x-guidance") if key in parameter.schema}
    rest = {key: value for key, value in parameter.schema.items() if key not in whole}
    given = rest.get("type", ())
    if left := [kind for kind in ([given] if isinstance(given, str) else given) if kind in kinds]:
        return parameter._replace(schema={**rest, "type": left, **whole})
    return parameter._replace(schema=whole | {"allOf": [rest, {"type": sorted(kinds)}]})


def can_name(name: str | None, tags: ValueTags) -> bool:
    """Whether what stands behind a parameter's name shows where it ends."""
    return name is None or not (tags.middle.strip() in name or tags.end in name or (tags.own_lines and "\n" in name))


class Triggered(Demanded):
    """Text, in which each trigger begins calls."""

    def whole(self, thought: Thought | None) -> tuple[str, list[str]]:
        """See Demanded. What looks like a call in a thought that the prompt has opened is text."""
        before, rules = "", [TEXT]
        if thought is not None and thought.place == "inside":
            before, rules = self.thought_rules(thought)
        elif thought is not None and {thought.opening, thought.closing} <= self.special_tokens.keys():
            before = f"(TEXT {self.text(thought.opening)} TEXT {self.text(thought.closing)})?"
        first, *rest = split_at_tokens(self.calls.trigger, self.special_tokens)
        if first in self.special_tokens:
            segment = [f"segment: TEXT {self.text(self.calls.trigger)} calls"]
        elif rest:
            segment = [f"OPENING: TEXT {json.dumps(first)}", f"segment: OPENING {self.text(''.join(rest))} calls"]
        else:
            segment = [f"opening[lazy]: TEXT {json.dumps(first)}", "segment: opening calls"]
        return f"{before} segment* TEXT", [*rules, TEXT, *segment, *self.call_rules()]
