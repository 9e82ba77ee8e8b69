"""Keys of objects that no schema names one by one, as patterns whose keys do not have a certain character in them.

The character is the first of a closing tag, so no such key spells the tag. Every function raises ValueError.
"""

import re
from collections.abc import Collection

TOKEN = re.compile(
    r"""(?P<group>\(\?P?<[A-Za-z_]\w*>)
        |(?P<number>\\(?:x\{(?P<braced>[0-9A-Fa-f]+)\}|x(?P<two>[0-9A-Fa-f]{2})|u(?P<four>[0-9A-Fa-f]{4})))
        |(?P<escape>\\.)
        |(?P<set>\[\^?\]?(?:\\.|[^\]\\])*\])
        |(?P<other>.)""",
    re.VERBOSE | re.DOTALL,
)
WIDE = {"\\S": r"\s", "\\D": r"\d", "\\W": r"\w"}  # sets that are the rest of others


def other_keys(names: Collection[str], character: str) -> str:
    """A pattern for all keys without the character, but these."""
    return f"^{_others(set(names), re.escape(character))}$"


def _others(endings: set[str], character: str) -> str:
    heads = sorted({ending[0] for ending in endings if ending})
    none = "".join(map(_by_number, heads))
    found = [f"[^{none}{character}][^{character}]*"]
    for head in heads:
        found.append(_by_number(head) + _others({ending[1:] for ending in endings if ending[:1] == head}, character))
    return f"(?:{'|'.join(found)}){'' if '' in endings else '?'}"


def _by_number(character: str) -> str:
    return f"\\x{{{ord(character):X}}}"


def without_character(pattern: str, character: str) -> str:
    """A pattern for those of the pattern's keys that do not have the character in them; all of the key must match.

    A pattern that names the character itself is refused.
    """
    opened, closed = pattern.startswith("^"), pattern.endswith("$") and not pattern.endswith("\\$")
    inner = pattern[opened : len(pattern) - closed]
    text = f"[^{re.escape(character)}]*"
    narrowed = "".join(_narrowed(token, character, pattern) for token in TOKEN.finditer(inner))
    return f"^{'' if opened else text}(?:{narrowed}){'' if closed else text}$"


def _narrowed(token: re.Match[str], character: str, pattern: str) -> str:
    """One token of a regular expression, without the character."""
    refused = ValueError(f"keys of the pattern {pattern!r} might spell the closing tag of the model's format of calls")
    written, escaped = token[0], re.escape(character)
    match token.lastgroup if token.lastgroup not in ("braced", "two", "four") else "number":
        case "group":
            return "("
        case "number":
            if int(token["braced"] or token["two"] or token["four"], 16) == ord(character):
                raise refused
        case "escape" if written in WIDE:
            return f"[^{WIDE[written]}{escaped}]"
        case "escape" if written in ("\\p", "\\P") or written[1] == character:
            raise refused
        case "set" if "[" in written[1:]:  # sets in sets
            raise refused
        case "set" if written.startswith("[^"):
            return f"{written[:-1]}{escaped}]"
        case "set":
            return _narrowed_set(written, character, refused)
        case "other" if written == ".":
            return f"[^{escaped}\\n]"
        case "other" if written == character:
            raise refused
    return written


def _narrowed_set(written: str, character: str, refused: ValueError) -> str:
    try:
        has_it = re.fullmatch(written, character)
    except re.error:
        raise refused from None
    return f"[{written}&&[^{re.escape(character)}]]" if has_it else written
