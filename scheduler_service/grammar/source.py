"""What a client wrote (JSON schema, regex, EBNF, structural tag) becomes grammar text for llguidance, with our caps.

The engine bounds its own work by fuel, except where a counted repetition is unrolled and where a schema is simply
large. Those are counted here first. Every function raises ValueError with a message that is safe to show.
"""

import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import msgspec
from llguidance import LLMatcher, regex_to_lark

from quartet.runtime import limits
from quartet.runtime.messages import Thought
from quartet.scheduler_service.grammar.json_schema import normalized

# Bounded, so that a model cannot fill its answer with blanks; wide enough for indented output.
JSON_OPTIONS = {"whitespace_flexible": True, "whitespace_pattern": r"[\x20\x0A\x0D\x09]{0,32}", "lenient": False}

SpecialTokens = Mapping[str, int]  # text → id, of tokens that no text encodes to

THOUGHT = "thought:"  # begins a line before a schema; no JSON does


def source(kind: str, text: str, special_tokens: SpecialTokens) -> str:
    """The engine's grammar for a constraint of this kind. Raises ValueError."""
    if kind == "json_schema":
        return from_json_schema(text, special_tokens)
    if kind == "structural_tag":
        return from_structural_tag(text, special_tokens)
    return SOURCES[kind](text)


def needs_tokens(kind: str, text: str) -> bool:
    """Whether the grammar names special tokens."""
    return kind == "structural_tag" or text.startswith(THOUGHT)


def from_json_schema(text: str, special_tokens: SpecialTokens) -> str:
    """Behind a thought where the text says so, see `behind_thought`."""
    if not text.startswith(THOUGHT):
        return LLMatcher.grammar_from_json_schema(json.dumps(checked_schema(text)))
    head, _, schema = text.removeprefix(THOUGHT).partition("\n")
    return _behind(msgspec.json.decode(head, type=Thought), json.dumps(checked_schema(schema)), special_tokens)


def behind_thought(schema: str, thought: Thought) -> str:
    """The text of a constraint: a thought, or none where the model need not have one, then what the schema wants."""
    return schema if thought.place == "past" else f"{THOUGHT}{msgspec.json.encode(thought).decode()}\n{schema}"


def _behind(thought: Thought, schema: str, special_tokens: SpecialTokens) -> str:
    closing = thought.closing
    if closing in special_tokens:
        end = [f"thought: TEXT <[{special_tokens[closing]}]>", r"TEXT: /(.|\n)*/"]
    else:
        end = [f"thought[lazy]: TEXT {json.dumps(closing)}", r"TEXT: /(.|\n)*/"]
    before = "" if thought.place == "inside" else f"{_spelled(thought.opening, special_tokens)} "
    start = f"{before}thought BLANKS" if thought.place == "inside" else f"(BLANKS {before}thought BLANKS)?"
    blanks = r"BLANKS: /[ \n\r\t]{0,8}/"
    lines = ["%llguidance {}", f"start: {start} answer", f"answer: %json {schema}", *end, blanks]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def checked_schema(text: str) -> dict[str, Any]:
    """The schema for the engine with our options in it, once its size and its patterns are found bearable."""
    try:
        schema = msgspec.json.decode(text)
    except RecursionError as error:
        raise ValueError("the schema is nested too deeply") from error
    if not isinstance(schema, dict):
        raise ValueError("a JSON schema must be an object")
    _check_size(schema)
    return {**normalized(schema), "x-guidance": JSON_OPTIONS}


def _check_size(schema: dict[str, Any]) -> None:
    nodes = 0
    waiting: list[Any] = [schema]
    while waiting:
        node = waiting.pop()
        nodes += 1
        if nodes > limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"the schema has more than {limits.MAX_GRAMMAR_NODES} nodes")
        if isinstance(node, dict):
            _check_patterns(node)
            waiting += node.values()
        elif isinstance(node, list):
            waiting += node


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


REGEX_PIECES = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|\{(\d+)(?:,(\d*))?\}|[*+?]|.", re.DOTALL)


def check_regex(text: str) -> None:
    """Refuse a pattern whose counted repetitions unroll to too many states."""
    size = Size()
    for piece in REGEX_PIECES.finditer(text):
        match piece[0][0]:
            case "(":
                size.open()
            case ")":
                size.close()
            case "{" if piece[1]:
                size.repeat(int(piece[2] or piece[1]))
            case "[" if len(piece[0]) == 1:  # else each further one would be looked for to the end of the text
                raise ValueError("a character set is not closed")
            case "*" | "+" | "?" | "|":
                pass
            case _:
                size.atom(1)
    size.total()


class Size:
    """Adds up how many states an expression has once its counted repetitions are written out."""

    def __init__(self) -> None:
        self._groups = [0]  # what each open group holds, its last element left out
        self._last = [0]  # the last element of each open group

    def atom(self, states: int) -> None:
        self._groups[-1] += self._last[-1]
        self._last[-1] = states

    def open(self) -> None:
        self._groups.append(0)
        self._last.append(0)

    def close(self) -> None:
        if len(self._groups) == 1:
            raise ValueError("a closing parenthesis has no opening one")
        self.atom_of_group(self._groups.pop() + self._last.pop())

    def atom_of_group(self, states: int) -> None:
        self.atom(max(states, 1))

    def repeat(self, times: int) -> None:
        self._last[-1] *= max(times, 1)
        if self._last[-1] > limits.MAX_GRAMMAR_STATES:
            raise ValueError(f"repetitions unroll to more than {limits.MAX_GRAMMAR_STATES} states")

    def total(self) -> int:
        states = sum(self._groups) + sum(self._last)
        if states > limits.MAX_GRAMMAR_STATES:
            raise ValueError(f"repetitions unroll to more than {limits.MAX_GRAMMAR_STATES} states")
        return states


# --- EBNF: `root ::= "a" [b-d]+ (rule | "e"){2,3} # comment`

EBNF_PIECES = re.compile(
    r"""(?P<blank>\s+|\#[^\n]*)
      | (?P<rule>[A-Za-z_][\w.-]*)(?=\s*::=)
      | (?P<name>[A-Za-z_][\w.-]*)
      | (?P<define>::=)
      | (?P<literal>"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*')
      | (?P<set>\[(?:\\.|[^\]\\])*\])
      | (?P<count>\{\s*+(?P<least>\d++)\s*+(?P<comma>,\s*+(?P<most>\d++)?+)?+\s*+\})
      | (?P<sign>[|()*+?.])""",
    re.VERBOSE | re.DOTALL,
)
ESCAPE = re.compile(r"\\(x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|U[0-9a-fA-F]{8}|.)|(.)", re.DOTALL)
NAMED_ESCAPES = {"n": "\n", "r": "\r", "t": "\t", "0": "\0", "b": "\b", "f": "\f", "v": "\v"}

Rules = dict[str, list[re.Match[str]]]


def from_ebnf(text: str) -> str:
    """Lark for a grammar in EBNF with the start rule `root`.

    A rule that reaches no recursive one is a regular language and becomes a terminal, matched as one word, longest
    first; the others become rules. A grammar without recursion is thus one exact regular expression.
    """
    rules = dict(_rules(text))
    if "root" not in rules:
        raise ValueError("an EBNF grammar needs a rule named root")
    regular = _regular(rules)
    names = {name: _lark_name(index, name, name in regular) for index, name in enumerate(rules)}
    _check_rules(rules, regular)
    lines = ["%llguidance {}", f"start: {names['root']}"]
    lines += [f"{names[name]}: {_body(body, names)}" for name, body in rules.items()]
    return LLMatcher.grammar_from_lark("\n".join(lines) + "\n")


def _rules(text: str) -> Iterator[tuple[str, list[re.Match[str]]]]:
    """The rules in order, each with its pieces; a rule ends where the next one is named."""
    at, name, body = 0, "", list[re.Match[str]]()
    seen: set[str] = set()
    while at < len(text):
        piece = EBNF_PIECES.match(text, at)
        if piece is None or (not name and piece.lastgroup not in ("blank", "rule")):
            line = text.count("\n", 0, at) + 1
            raise ValueError(f"line {line}: unexpected {text[at : at + 20]!r}")
        at = piece.end()
        if piece["rule"]:
            if name:
                yield name, body
            name, body = piece["rule"], []
            if name in seen:
                raise ValueError(f"rule {name!r} is defined twice")
            seen.add(name)
        elif not piece["blank"] and not piece["define"]:
            body.append(piece)
    if name:
        yield name, body


def _regular(rules: Rules) -> list[str]:
    """The rules that reach no recursion, each after all it refers to."""
    waits_for = {name: {p["name"] for p in body if p["name"]} for name, body in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, needed in waits_for.items():
        for other in needed:
            if other not in rules:
                raise ValueError(f"rule {other!r} is used by {name!r} and defined nowhere")
            users[other].append(name)
    regular = [name for name, needed in waits_for.items() if not needed]
    for name in regular:  # grows while it is walked
        for user in users[name]:
            waits_for[user].discard(name)
            if not waits_for[user]:
                regular.append(user)
    return regular


def _lark_name(index: int, name: str, terminal: bool) -> str:
    plain = f"r{index}_{re.sub(r'[^a-zA-Z0-9]', '_', name)}"
    return plain.upper() if terminal else plain.lower()


def _check_rules(rules: Rules, regular: list[str]) -> None:
    states: dict[str, int] = {}
    for name in [*regular, *(rules.keys() - set(regular))]:
        size = Size()
        for piece in rules[name]:
            if piece["count"]:
                size.repeat(int(piece["most"] or piece["least"]))
            elif piece["sign"] == "(":
                size.open()
            elif piece["sign"] == ")":
                size.close()
            elif not piece["sign"] or piece["sign"] == ".":
                size.atom(states.get(piece["name"], 1))
        states[name] = size.total()


def _body(pieces: list[re.Match[str]], names: Mapping[str, str]) -> str:
    out = []
    for piece in pieces:
        match piece.lastgroup:
            case "name":
                out.append(names[piece["name"]])
            case "literal":
                out.append(json.dumps("".join(_characters(piece["literal"][1:-1]))))
            case "set":
                out.append(_set(piece["set"][1:-1]))
            case "count" | "least" | "comma" | "most":
                out.append(re.sub(r"\s", "", piece["count"]))
            case _:
                out.append("/(.|\\n)/" if piece[0] == "." else piece[0])
    return " ".join(out) or '""'


def _characters(text: str) -> Iterator[str]:
    """The characters that a literal or a set spells, escapes resolved."""
    for match in ESCAPE.finditer(text):
        escaped, plain = match.groups()
        if escaped is None:
            yield plain
        elif len(escaped) > 1:
            yield _character(int(escaped[1:], 16))
        else:
            yield NAMED_ESCAPES.get(escaped, escaped)


def _character(number: int) -> str:
    if number > sys.maxunicode:
        raise ValueError(f"there is no character with the number {number:X}")
    return chr(number)


def _set(text: str) -> str:
    """A character set as a regex, every character by its number."""
    negated, text = ("^", text[1:]) if text.startswith("^") else ("", text)
    pieces = [(match[0], next(_characters(match[0]))) for match in ESCAPE.finditer(text)]
    ranges, at = [], 0
    while at < len(pieces):
        low = pieces[at][1]
        if at + 2 < len(pieces) and pieces[at + 1][0] == "-":
            high, at = pieces[at + 2][1], at + 3
        else:
            high, at = low, at + 1
        ranges.append(rf"\x{{{ord(low):X}}}-\x{{{ord(high):X}}}")
    if not ranges:
        raise ValueError("a character set is empty")
    return f"/[{negated}{''.join(ranges)}]/"


# --- structural tags: free text in which certain openings are followed by constrained text


class _Structure(msgspec.Struct):
    begin: str
    schema: dict[str, Any]
    end: str = ""


class _StructuralTag(msgspec.Struct, forbid_unknown_fields=True):
    structures: list[_Structure]
    triggers: list[str]
    type: str = "structural_tag"


def from_structural_tag(text: str, special_tokens: SpecialTokens) -> str:
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
    rest = _spelled(structure.begin.removeprefix(trigger), special_tokens)
    end = _spelled(structure.end, special_tokens)
    if trigger in special_tokens:
        yield f"{name}: TEXT <[{special_tokens[trigger]}]> {rest} %json {json.dumps(schema)} {end}"
    else:
        yield f"{name}_opening[lazy]: TEXT {json.dumps(trigger)}"
        yield f"{name}: {name}_opening {rest} %json {json.dumps(schema)} {end}"


def _spelled(text: str, special_tokens: SpecialTokens) -> str:
    """A fixed text: special tokens by id, the rest as literals."""
    if not text:
        return ""
    names = "|".join(re.escape(name) for name in sorted(special_tokens, key=len, reverse=True) if name)
    parts = re.split(f"({names})", text) if names else [text]
    return " ".join(f"<[{special_tokens[p]}]>" if p in special_tokens else json.dumps(p) for p in parts if p)


SOURCES: dict[str, Callable[[str], str]] = {
    "regex": from_regex,
    "ebnf": from_ebnf,
}
