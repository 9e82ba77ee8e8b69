"""A client's JSON schema in the form that the grammar engine takes, closed to keys that nobody declared.

Every reference leads to `#/$defs` of the result; `oneOf` becomes `anyOf`; what is an annotation, or constrains
nothing, is left out; what would constrain and cannot be had is refused by its name. An object that declares keys and
says nothing of others takes no others (an absent `additionalProperties` means false); where parts of a schema are
combined, the keys of all parts count. An object that declares none is free. Every function raises ValueError.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from quartet.runtime import limits
from quartet.scheduler_service.grammar.schema_refs import Node, Place, References

MAX_DEPTH = 96
# Other formats are annotations.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
SAME = frozenset(
    ("type", "enum", "const", "pattern", "minLength", "maxLength", *NUMBERS, "minItems", "maxItems", "required")
)
OF_OBJECTS = ("properties", "patternProperties", "additionalProperties", "required")
BRANCHES = ("anyOf", "oneOf")

Names = frozenset[str]

# What the engine cannot do: keyword → whether it constrains anything in this node.
REFUSED: dict[str, Callable[[Node], bool]] = {
    "not": lambda node: node["not"] is not False,
    "if": lambda node: any(node.get(key, True) not in (True, {}) for key in ("then", "else")),
    "uniqueItems": lambda node: node["uniqueItems"] is True and node.get("maxItems", 2) != 1,
    "contains": lambda node: node.get("minContains", 1) != 0 or "maxContains" in node,
    "propertyNames": lambda node: node["propertyNames"] not in (True, {}, {"type": "string"}),
    "dependentRequired": lambda node: bool(node["dependentRequired"]),
    "dependentSchemas": lambda node: bool(node["dependentSchemas"]),
    "dependencies": lambda node: bool(node["dependencies"]),
    "unevaluatedItems": lambda node: node["unevaluatedItems"] is not True and combined(node),
    "$dynamicRef": lambda node: True,
    "$recursiveRef": lambda node: True,
}


@dataclass(frozen=True)
class Declared:
    """What a schema, with all that it is combined of, says about the keys of an object."""

    names: Names = frozenset()
    patterns: Names = frozenset()
    speaks: bool = False  # of keys at all
    settled: bool = False  # it says itself what holds for other keys

    def __or__(self, other: "Declared") -> "Declared":
        return Declared(
            self.names | other.names,
            self.patterns | other.patterns,
            self.speaks or other.speaks,
            self.settled or other.settled,
        )


@dataclass
class Definitions:
    """The subschemas that references lead to, by what they are and by the keys that were declared around them."""

    names: dict[tuple[int, Declared | None], str] = field(default_factory=dict)
    bodies: dict[str, Any] = field(default_factory=dict)


def normalized(schema: Node) -> Node:
    """The schema for the engine."""
    return Normalizer(schema).result()


class Normalizer:
    """Works on one schema."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._references = References(root)
        self._definitions = Definitions()
        self._waiting: list[tuple[str, Place, Declared | None]] = []
        self._declared: dict[int, Declared] = {}
        self._nodes = 0

    def result(self) -> Node:
        schema = self._schema(Place(self._root), Declared(), 0)
        while self._waiting:
            name, place, around = self._waiting.pop()
            self._definitions.bodies[name] = self._schema(place, around, 0)
        if not isinstance(schema, dict):
            schema = {"anyOf": [schema]}
        return {**schema, "$defs": self._definitions.bodies} if self._definitions.bodies else schema

    def _schema(self, place: Place, around: Declared | None, depth: int) -> Any:
        """One subschema. `around`: what those that it is combined with declare; None: one of them closes the object."""
        node = place.node
        self._nodes += 1
        if self._nodes > limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"the schema has more than {limits.MAX_GRAMMAR_NODES} nodes")
        if depth > MAX_DEPTH:
            raise ValueError("the schema is nested too deeply")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise ValueError(f"a schema must be an object or a boolean, not {type(node).__name__}")
        refuse(node)
        if is_reference_alone(node):
            return {"$ref": self._definition(self._references.target(place, node["$ref"]), around)}
        out = {key: value for key, value in node.items() if key in SAME}
        numbers(node, out)
        if node.get("format") in FORMATS and may_be("string", node):
            out["format"] = node["format"]
        self._items(place, out, depth)
        self._keys(place, out, depth)
        if around is not None:
            around = around | self._own(place)
        branching = self._branches(place, out, around, depth)
        self._parts(place, out, depth)
        if around is not None and not branching:
            close(node, out, around)
        counts(node, out)
        return out

    def _definition(self, target: Place, around: Declared | None) -> str:
        """The reference to what stands there."""
        key = id(target.node), around
        name = self._definitions.names.get(key)
        if name is None:
            name = self._definitions.names[key] = f"d{len(self._definitions.names)}"
            self._waiting.append((name, target, around))
        return f"#/$defs/{name}"

    # Arrays and objects: whatever stands in them begins anew.

    def _items(self, place: Place, out: Node, depth: int) -> None:
        node = place.node
        prefix, rest = node.get("prefixItems"), node.get("items", node.get("unevaluatedItems"))
        if isinstance(rest, list):  # as drafts before 2020-12 write tuples
            prefix, rest = rest, node.get("additionalItems")
        if prefix is not None:
            out["prefixItems"] = [
                self._schema(place.inner(item), Declared(), depth + 1) for item in expect(list, prefix, "prefixItems")
            ]
            if rest is None and node.get("minItems", 0) <= len(prefix):
                rest = False
        if rest is not None:
            out["items"] = self._schema(place.inner(rest), Declared(), depth + 1)

    def _keys(self, place: Place, out: Node, depth: int) -> None:
        for keyword in ("properties", "patternProperties"):
            if keyword in place.node:
                given = expect(dict, place.node[keyword], keyword)
                out[keyword] = {
                    key: self._schema(place.inner(value), Declared(), depth + 1) for key, value in given.items()
                }
        rest = place.node.get("additionalProperties", place.node.get("unevaluatedProperties"))
        if rest is not None and ("additionalProperties" in place.node or not combined(place.node)):
            out["additionalProperties"] = self._schema(place.inner(rest), Declared(), depth + 1)

    # Combinations: their parts describe the same value.

    def _parts(self, place: Place, out: Node, depth: int) -> None:
        """All of these hold: they stay open, for the whole is closed."""
        parts = [self._schema(part, None, depth + 1) for part in self._all_of(place)]
        parts += [{"anyOf": branches} for branches in out.pop("more anyOf", [])]
        if parts:
            out["allOf"] = parts

    def _branches(self, place: Place, out: Node, around: Declared | None, depth: int) -> bool:
        """One of these holds: each is closed on its own, with what stands around it."""
        groups = [
            [place.inner(branch) for branch in expect(list, place.node[k], k)] for k in BRANCHES if k in place.node
        ]
        for index, group in enumerate(groups):
            others = [branch for other, branches in enumerate(groups) if other != index for branch in branches]
            beside = None if around is None else around | self._any_of(others)
            branches = [self._schema(branch, beside, depth + 1) for branch in group]
            if index:
                out["more anyOf"] = [branches]
            else:
                out["anyOf"] = branches
        return bool(groups)

    def _all_of(self, place: Place) -> Iterable[Place]:
        for part in expect(list, place.node.get("allOf", []), "allOf"):
            yield place.inner(part)
        if "$ref" in place.node:
            yield self._references.target(place, place.node["$ref"])

    # What is declared.

    def _own(self, place: Place) -> Declared:
        """By a schema and by all that must hold with it; of branches in those parts, whatever any of them says."""
        node = place.node
        if not isinstance(node, dict):
            return Declared()
        known = self._declared.get(id(node))
        if known is not None:
            return known
        self._declared[id(node)] = Declared()  # of a part that contains itself
        properties = expect(dict, node.get("properties", {}), "properties")
        found = Declared(
            frozenset(properties) | frozenset(filter(is_text, expect(list, node.get("required", []), "required"))),
            frozenset(expect(dict, node.get("patternProperties", {}), "patternProperties")),
            "properties" in node or "patternProperties" in node,
            "additionalProperties" in node or node.get("unevaluatedProperties", False) is not False,
        )
        for part in self._all_of(place):
            found |= self._own(part) | self._any_of(self._branches_of(part))
        self._declared[id(node)] = found
        return found

    def _branches_of(self, place: Place) -> list[Place]:
        if not isinstance(place.node, dict):
            return []
        return [place.inner(branch) for key in BRANCHES for branch in expect(list, place.node.get(key, []), key)]

    def _any_of(self, branches: Iterable[Place]) -> Declared:
        found = Declared()
        for branch in branches:
            found |= self._own(branch) | self._any_of(self._branches_of(branch))
        return found


def close(node: Node, out: Node, declared: Declared) -> None:
    """Take no keys that nobody declared."""
    closed = node.get("unevaluatedProperties") is False
    if "additionalProperties" in out or declared.settled or not (declared.speaks or closed):
        return
    if not may_be("object", node):
        return
    properties = out.get("properties", {})
    out["properties"] = properties | {name: True for name in sorted(declared.names) if name not in properties}
    if declared.patterns:
        patterns = out.get("patternProperties", {})
        out["patternProperties"] = patterns | {name: True for name in declared.patterns if name not in patterns}
    out["additionalProperties"] = False


def refuse(node: Node) -> None:
    """Name the first keyword that would constrain and cannot be had."""
    for keyword, constrains in REFUSED.items():
        if keyword in node and constrains(node):
            raise ValueError(f"the keyword {keyword} is not supported")
    rest = node.get("unevaluatedProperties")
    if rest not in (None, True, False) and combined(node):
        raise ValueError("the keyword unevaluatedProperties with a schema is not supported beside combinations")


def combined(node: Node) -> bool:
    return any(key in node for key in ("allOf", "anyOf", "oneOf", "$ref"))


def is_reference_alone(node: Node) -> bool:
    """Nothing stands beside the reference that constrains."""
    others = {
        *SAME,
        *OF_OBJECTS,
        *BRANCHES,
        "allOf",
        "items",
        "prefixItems",
        "minProperties",
        "maxProperties",
        "format",
    }
    return "$ref" in node and node.keys().isdisjoint(others | {"unevaluatedProperties"})


def numbers(node: Node, out: Node) -> None:
    """Draft 4 wrote exclusive bounds as booleans."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(exclusive), bool):
            del out[exclusive]
            if node[exclusive] and bound in out:
                out[exclusive] = out.pop(bound)


def counts(node: Node, out: Node) -> None:
    """The least and the most keys, where the keys that are declared do not see to that already."""
    least, most = node.get("minProperties"), node.get("maxProperties")
    if least is not None and not (isinstance(least, int) and least <= len(out.get("required", []))):
        out["minProperties"] = least
    closed = out.get("additionalProperties") is False and not out.get("patternProperties")
    if most is not None and not (closed and isinstance(most, int) and len(out.get("properties", {})) <= most):
        out["maxProperties"] = most


def may_be(kind: str, node: Node) -> bool:
    kinds = node.get("type", kind)
    return kind in kinds if isinstance(kinds, list) else kinds == kind


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def expect(kind: type[Any], value: Any, keyword: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{keyword} must be {'an object' if kind is dict else 'a list'}")
    return value
