"""Translates what a client wrote (JSON schema, regex, EBNF, structural tag) to a grammar of llguidance, within limits.

The engine limits its own work, except where a counted repetition is unrolled and where a schema is large. Both are
checked here first. Every function raises ValueError with a message that is safe to show.
"""

import json

import msgspec
from llguidance import LLMatcher, regex_to_lark

from quartet.runtime.messages import Thought
from quartet.scheduler_service.grammar.checked_schema import checked_schema
from quartet.scheduler_service.grammar.ebnf import from_ebnf
from quartet.scheduler_service.grammar.lark import SpecialTokens, literal
from quartet.scheduler_service.grammar.regex_size import check_regex
from quartet.scheduler_service.grammar.structural_tag import from_structural_tag

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
    return kind in ("structural_tag", "call_grammar") or text.startswith(THOUGHT)


def from_json_schema(text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a schema, after a thought where the text says so (see `after_thought`)."""
    thought, text = split_thought(text)
    schema = json.dumps(checked_schema(text))
    return LLMatcher.grammar_from_json_schema(schema) if thought is None else _after(thought, schema, special_tokens)


def after_thought(text: str, thought: Thought) -> str:
    """The text of a constraint: first the thought, if the model thinks or has to, then what `text` constrains."""
    return text if thought.place == "past" else f"{THOUGHT}{msgspec.json.encode(thought).decode()}\n{text}"


def split_thought(text: str) -> tuple[Thought | None, str]:
    """The reverse of `after_thought`."""
    if not text.startswith(THOUGHT):
        return None, text
    head, _, rest = text.removeprefix(THOUGHT).partition("\n")
    return msgspec.json.decode(head, type=Thought), rest


def _after(thought: Thought, schema: str, special_tokens: SpecialTokens) -> str:
    start, rules = thought_rules(thought, special_tokens)
    lines = ["%llguidance {}", f"start: {start} answer", f"answer: %json {schema}", *rules]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def thought_rules(thought: Thought, special_tokens: SpecialTokens, behind: str = "") -> tuple[str, list[str]]:
    """What the Lark of an output begins with where there is or may be a thought, and the rules for it.

    `behind`: what stands between a thought and the rest.
    """
    closing = thought.closing
    if closing in special_tokens:
        end = [f"thought: TEXT <[{special_tokens[closing]}]>", r"TEXT: /(.|\n)*/"]
    else:
        end = [f"thought[lazy]: TEXT {json.dumps(closing)}", r"TEXT: /(.|\n)*/"]
    before = "" if thought.place == "inside" else f"{literal(thought.opening, special_tokens)} "
    whole = f"{before}thought BLANKS {literal(behind, special_tokens)}".rstrip()
    start = whole if thought.place == "inside" else f"(BLANKS {whole})?"
    return start, [*end, r"BLANKS: /[ \n\r\t]{0,8}/"]


def from_regex(text: str) -> str:
    """The whole output matches; \\d, \\w and \\s mean ASCII."""
    check_regex(text)
    return LLMatcher.grammar_from_lark(f"start: /{regex_to_lark(text, 'dws')}/")
