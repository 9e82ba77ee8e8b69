"""Translates what a client wrote (JSON schema, regex, EBNF, structural tag) to a grammar of llguidance, within limits.

The engine limits its own work, except where a counted repetition is unrolled and where a schema is large. Both are
checked here first. Every function raises ValueError with a message that is safe to show.
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, regex_to_lark

from quartet.runtime import limits
from quartet.runtime.messages import Thought
from quartet.scheduler_service.grammar.ebnf import from_ebnf
from quartet.scheduler_service.grammar.json_schema import normalized
from quartet.scheduler_service.grammar.regex_size import check_regex

# Bounded, so that a model cannot fill its answer with blanks; wide enough for indented output.
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "lenient": False}

SpecialTokens = Mapping[str, int]  # text → id, of tokens that ordinary text is never encoded to

THOUGHT = "thought:"  # begins a line before a schema; no JSON begins like this


def source(kind: str, text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a constraint of this kind. Raises ValueError."""
    match kind:
        case "json_schema":
            return from_json_schema(text, special_tokens)
        case "structural_tag":
            return from_structural_tag(text, special_tokens)
        case "regex":
            return from_regex(text)
        case "ebnf":
            return from_ebnf(text)
    raise ValueError(f"there is no kind {kind!r} of grammars")


def needs_tokens(kind: str, text: str) -> bool:
    """Whether the grammar names special tokens."""
    return kind == "structural_tag" or text.startswith(THOUGHT)


def from_json_schema(text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a schema, after a thought where the text says so (see `after_thought`)."""
    if not text.startswith(THOUGHT):
        return LLMatcher.grammar_from_json_schema(json.dumps(checked_schema(text)))
    head, _, schema = text.removeprefix(THOUGHT).partition("\n")
    return _after(msgspec.json.decode(head, type=Thought), json.dumps(checked_schema(schema)), special_tokens)


def after_thought(schema: str, thought: Thought) -> str:
    """The text of a constraint: first the thought, if the model thinks or has to, then JSON of the schema."""
    return schema if thought.place == "past" else f"{THOUGHT}{msgspec.json.encode(thought).decode()}\n{schema}"


def _after(thought: Thought, schema: str, special_tokens: SpecialTokens) -> str:
    closing = thought.closing
    if closing in special_tokens:
        end = [f"thought: TEXT <[{special_tokens[closing]}]>", r"TEXT: /(.|\n)*/"]
    else:
        end = [f"thought[lazy]: TEXT {json.dumps(closing)}", r"TEXT: /(.|\n)*/"]
    before = "" if thought.place == "inside" else f"{_literal(thought.opening, special_tokens)} "
    start = f"{before}thought BLANKS" if thought.place == "inside" else f"(BLANKS {before}thought BLANKS)?"
    blanks = r"BLANKS: /[ \n\r\t]{0,8}/"
    lines = ["%llguidance {}", f"start: {start} answer", f"answer: %json {schema}", *end, blanks]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def checked_schema(text: str) -> dict[str, Any]:
    """The schema for the engine, with our options in it and its size and patterns checked."""
    try:
        schema = msgspec.json.decode(text)
    except RecursionError as error:
        raise ValueError("the schema is nested too deeply") from error
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    _check_size(schema)
    return {**normalized(schema), "x-guidance": JSON_OPTIONS}


def _check_size(schema: dict[str, Any]) -> None:
    """Raise ValueError for too many nodes, or a pattern that unrolls to too many states."""
    nodes = 0
    to_visit: list[Any] = [schema]
    while to_visit:
        node = to_visit.pop()
        nodes += 1
        if nodes > limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"the schema has more than {limits.MAX_GRAMMAR_NODES} nodes")
        if isinstance(node, dict):
            _check_patterns(node)
            to_visit += node.values()
        elif isinstance(node, list):
            to_visit += node


def _check_patterns(node: dict[str, Any]) -> None:
    if isinstance(node.get("pattern"), str):
        check_regex(node["pattern"])
    if isinstance(node.get("patternProperties"), dict):
        for pattern in node["patternProperties"]:
            check_regex(pattern)


def from_regex(text: str) -> str:
    """The whole output matches; \\d, \\w and \\s mean ASCII."""
    check_regex(text)
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'dws')}/")


class _Structure(msgspec.Struct):
    begin: str
    schema: dict[str, Any]
    end: str = ""


class _StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: str = "structural_tag"


def from_structural_tag(text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for free text in which each trigger begins a structure with JSON of its schema."""
    tag = msgspec.json.decode(text, type=_StructuralTag)
    if not tag.structures:
        raise ValueError("structural_tag needs at least one structure")
    lines = ["%llguidance {}", f"start: ({' | '.join(f'tag{i}' for i in range(len(tag.structures)))})* tail"]
    lines += ["tail: TEXT", r"TEXT: /(.|\n)*/"]
    for index, structure in enumerate(tag.structures):
        trigger = next((t for t in tag.triggers if t and structure.begin.startswith(t)), None)
        if trigger is None:
            raise ValueError(f"the begin {structure.begin!r} starts with none of the triggers")
        lines += _tag(f"tag{index}", trigger, structure, special_tokens)
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def _tag(name: str, trigger: str, structure: _Structure, special_tokens: SpecialTokens) -> Iterator[str]:
    """The rules of one structure: text up to the trigger, then what must follow it."""
    schema = checked_schema(json.dumps(structure.schema))
    rest = _literal(structure.begin.removeprefix(trigger), special_tokens)
    end = _literal(structure.end, special_tokens)
    if trigger in special_tokens:
        yield f"{name}: TEXT <[{special_tokens[trigger]}]> {rest} %json {json.dumps(schema)} {end}"
    else:
        yield f"{name}_opening[lazy]: TEXT {json.dumps(trigger)}"
        yield f"{name}: {name}_opening {rest} %json {json.dumps(schema)} {end}"


def _literal(text: str, special_tokens: SpecialTokens) -> str:
    """The Lark of a fixed text: special tokens by id, the rest as string literals."""
    if not text:
        return ""
    names = "|".join(re.escape(name) for name in sorted(special_tokens, key=len, reverse=True) if name)
    parts = re.split(f"({names})", text) if names else [text]
    return " ".join(f"<[{special_tokens[p]}]>" if p in special_tokens else json.dumps(p) for p in parts if p)
