"""Reads the JSON body of a request into its struct.

Fields that are not known are ignored, for clients of other servers send theirs. One that looks like a known field
written wrongly is refused with both names: whoever wrote it believes that it counts. So is one that the body has in
another place (`ELSEWHERE` of its struct), and one that another of our APIs has (`OF_OTHER_APIS`).
"""

from collections.abc import Iterable, Mapping
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request as HTTPRequest

from quartet.http_gateway.generation import other_names
from quartet.http_gateway.routes.endpoint import convert_body, read_body
from quartet.runtime import limits
from quartet.runtime.errors import FieldRefused

Body = TypeVar("Body")

MISPLACED = "`{}` stands in the wrong place: put it into `{}`."
OF_ANOTHER_API = "`{}` is no field of this endpoint: {}."
MISSPELT = "Unknown field `{}`: did you mean `{}`?"
SHORTEST = 4  # characters of a name that is compared; of a shorter one, only its last letter may be missing
LONG = 8  # from here on two mistakes are seen through
# Fields of other servers and clients that look like ours and mean something else.
FOREIGN = frozenset({"inputs", "message", "mode", "models", "prompts", "seeds", "tags", "texts", "users"})


async def read_json_body(http: HTTPRequest, kind: type[Body]) -> Body:
    """The body of a request. Raises RequestError, msgspec.DecodeError and UnicodeDecodeError."""
    return await convert_body(http, decode_json_body, await read_body(http), kind)


def decode_json_body(raw: bytes, kind: type[Body]) -> Body:
    """The same of bytes that are there. JSON is UTF-8, in fields that nobody reads too."""
    if not raw.isascii():
        raw.decode()
    given = msgspec.json.decode(raw, type=dict[str, msgspec.Raw])
    refuse_misplaced(given, kind)
    refuse_other_names(given, kind)
    refuse_misspelt(given, kind)
    return msgspec.json.decode(raw, type=kind)


def refuse_misplaced(given: Mapping[str, msgspec.Raw], kind: type) -> None:
    """Raise FieldRefused for the first field that has a value and belongs into another one; null asks for nothing."""
    elsewhere: Mapping[str, str] = getattr(kind, "ELSEWHERE", {})
    for name, value in given.items():
        if name in elsewhere and bytes(value) != b"null":
            raise FieldRefused(MISPLACED.format(name, elsewhere[name]), field=name)


@cache
def other_names_of(kind: type) -> Mapping[str, str]:
    """Fields that other APIs have and this body has not, and what to do instead."""
    found: Mapping[str, str] = getattr(kind, "OF_OTHER_APIS", {})
    return {name: instead for name, instead in found.items() if name not in names_of(kind)}


def refuse_other_names(given: Mapping[str, Any], kind: type) -> None:
    """Raise FieldRefused for the first field of another API that asks for something.

    One that stands there under its name here too, with the same value, is what clients of several servers send.
    """
    others = other_names_of(kind)
    for name in sorted(others.keys() & given.keys()):
        value = decoded(given[name])
        said = {other_names.use(own): own for own in given.keys() & names_of(kind)}.get(others[name])
        if other_names.asks(name, value) and (said is None or decoded(given[said]) != value):
            raise FieldRefused(OF_ANOTHER_API.format(name, others[name]), field=name)


def decoded(value: Any) -> Any:
    return msgspec.json.decode(value) if isinstance(value, msgspec.Raw) else value


def refuse_misspelt(given: Iterable[str], kind: type) -> None:
    """Raise FieldRefused for the first field that is a known one written wrongly."""
    known = names_of(kind)
    for name in islice((name for name in given if name not in known), limits.MAX_COMPARED_FIELDS):
        if name not in FOREIGN and (meant := next((own for own in known if is_misspelt(name, own)), None)):
            raise FieldRefused(MISSPELT.format(name, meant), field=name)


@cache
def names_of(kind: type) -> tuple[str, ...]:
    return tuple(field.encode_name for field in msgspec.structs.fields(kind))


def is_misspelt(name: str, known: str) -> bool:
    """Whether a name is a known one but for a mistake or, in a long name, two."""
    shorter = min(len(name), len(known))
    if shorter == SHORTEST - 1 and known[:-1] == name:
        return True
    if shorter < SHORTEST or abs(len(name) - len(known)) > 2 or is_sibling(name, known):
        return False
    if plain(name) == plain(known):
        return True
    most = 2 if shorter >= LONG else 1
    return len(set(name) ^ set(known)) <= 2 * most and distance(name, known) <= most


def plain(name: str) -> str:
    return name.replace("_", "").replace("-", "").lower()


def is_sibling(name: str, known: str) -> bool:
    """`top_a` is no `top_p`, `min_length` no `max_length`: another word in the same place."""
    ours, theirs = known.split("_"), name.split("_")
    different = [pair for pair in zip(ours, theirs, strict=False) if pair[0] != pair[1]]
    if len(ours) != len(theirs) or len(different) != 1:
        return False
    pair = different[0]
    return set(map(len, pair)) == {1} or set(pair) == {"min", "max"}


def distance(left: str, right: str) -> int:
    """How many letters were put in, left out, replaced or swapped with their neighbour."""
    before: list[int] = []
    row = list(range(len(right) + 1))
    for i, mine in enumerate(left, 1):
        before, above, row = row, before, [i]
        for j, theirs in enumerate(right, 1):
            cost = min(before[j] + 1, row[j - 1] + 1, before[j - 1] + (mine != theirs))
            if i > 1 and j > 1 and mine == right[j - 2] and left[i - 2] == theirs:
                cost = min(cost, above[j - 2] + 1)
            row.append(cost)
    return row[-1]
