"""Grammars in EBNF, for example `root ::= "a" [b-d]+ (rule | "e"){2,3} # comment`, become Lark grammars."""

import json
import re
import sys
from collections.abc import Iterator, Mapping

from llguidance import LLMatcher

from quartet.scheduler_service.grammar.regex_size import RegexSize

PIECES = re.compile(
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
    """The engine's grammar for one in EBNF with the start rule `root`. Raises ValueError.

    A rule that reaches no recursive rule is a regular language and becomes a terminal, matched as one word, longest
    first; the others become rules. So a grammar without recursion is one exact regular expression.
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
    """The rules in order, each with its pieces; a rule ends where the next one begins."""
    at, name, body = 0, "", list[re.Match[str]]()
    seen: set[str] = set()
    while at < len(text):
        piece = PIECES.match(text, at)
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
    """The rules that reach no recursive one, each after all it refers to."""
    waits_for = {name: {p["name"] for p in body if p["name"]} for name, body in rules.items()}
    users: dict[str, list[str]] = {name: [] for name in rules}
    for name, needed in waits_for.items():
        for other in needed:
            if other not in rules:
                raise ValueError(f"rule {other!r} is used by {name!r} and defined nowhere")
            users[other].append(name)
    regular = [name for name, needed in waits_for.items() if not needed]
    for name in regular:  # grows while it is iterated
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
        size = RegexSize()
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
    """The characters of a literal or a set, with escapes resolved."""
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
