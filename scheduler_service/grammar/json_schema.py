"""Normalises a client's JSON schema for the grammar engine, and closes its objects to keys that are not declared.

In the result every reference points into `#/$defs`, and `oneOf` is `anyOf`. Annotations and keywords that constrain
nothing are left out; keywords that constrain and are not supported are refused by name. An object that declares keys
takes no others unless the schema says otherwise (a missing `additionalProperties` means false); where schemas are
combined, the keys of all parts are declared. An object that declares no keys takes any. Every function raises
ValueError.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from quartet.runtime import limits
from quartet.scheduler_service.grammar.schema_refs import Location, Node, References

MAX_DEPTH = 96
# Other formats do not constrain.
FORMATS = frozenset(("date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid", "uri"))
NUMBERS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
COUNTS = ("minLength", "maxLength", "minItems", "maxItems")
BOUNDS = (*COUNTS, *NUMBERS)
COPIED = frozenset(("type", "enum", "const", "pattern", *BOUNDS, "required"))
UNSET = (*BOUNDS, "required", "properties", "patternProperties")  # where they are null: some clients write all keywords
OBJECT_KEYWORDS = ("properties", "patternProperties", "additionalProperties", "required")
BRANCHES = ("anyOf", "oneOf")

Names = frozenset[str]

# What the engine does not support: keyword → whether it constrains anything in this node.
UNSUPPORTED: dict[str, Callable[[Node], bool]] = {
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
    """The keys of an object that a schema, with all schemas combined in it, declares."""

    names: Names = frozenset()
    patterns: Names = frozenset()
    any_keys: bool = False  # it has `properties` or `patternProperties`
    decides_others: bool = False  # it says itself which other keys are taken

    def __or__(self, other: "Declared") -> "Declared":
        return Declared(
            self.names | other.names,
            self.patterns | other.patterns,
            self.any_keys or other.any_keys,
            self.decides_others or other.decides_others,
        )


@dataclass
class Definitions:
    """The subschemas that references point to, by identity and by the keys that are declared around them."""

    names: dict[tuple[int, Declared | None], str] = field(default_factory=dict)
    bodies: dict[str, Any] = field(default_factory=dict)


def normalized(schema: Node) -> Node:
    """The schema for the engine."""
    return Normalizer(schema).result()


class Normalizer:
    """Normalises one schema."""

    def __init__(self, root: Node) -> None:
        self._root = root
        self._references = References(root)
        self._definitions = Definitions()
        self._to_visit: list[tuple[str, Location, Declared | None]] = []
        self._declared: dict[int, Declared] = {}
        self._nodes = 0

    def result(self) -> Node:
        schema = self._schema(Location(self._root), Declared(), 0)
        while self._to_visit:
            name, location, around = self._to_visit.pop()
            self._definitions.bodies[name] = self._schema(location, around, 0)
        if not isinstance(schema, dict):
            schema = {"anyOf": [schema]}
        return {**schema, "$defs": self._definitions.bodies} if self._definitions.bodies else schema

    def _schema(self, location: Location, around: Declared | None, depth: int) -> Any:
        """One subschema. `around`: what schemas combined with it declare; None: one of those closes the object."""
        node = location.node
        self._nodes += 1
        if self._nodes > limits.MAX_GRAMMAR_NODES:
            raise ValueError(f"the schema has more than {limits.MAX_GRAMMAR_NODES} nodes")
        if depth > MAX_DEPTH:
            raise ValueError("the schema is nested too deeply")
        if isinstance(node, bool):
            return node
        if not isinstance(node, dict):
            raise ValueError(f"a schema must be an object or a boolean, not {type(node).__name__}")
        refuse_unsupported(node)
        if is_reference_alone(node):
            return {"$ref": self._definition(self._references.target(location, node["$ref"]), around)}
        out = {key: value for key, value in node.items() if key in COPIED and not (value is None and key in UNSET)}
        out |= {key: whole(out[key]) for key in COUNTS if key in out}
        convert_exclusive_bounds(node, out)
        refuse_wrong_types(out)
        if is_text(node.get("format")) and node["format"] in FORMATS and may_be("string", node):
            out["format"] = node["format"]
        self._items(location, out, depth)
        self._keys(location, out, depth)
        if around is not None:
            around = around | self._own(location)
        branching = self._branches(location, out, around, depth)
        self._parts(location, out, depth)
        if around is not None and not branching:
            close_object(node, out, around)
        add_key_counts(node, out)
        return out

    def _definition(self, target: Location, around: Declared | None) -> str:
        """A reference to the definition made of a subschema."""
        key = id(target.node), around
        name = self._definitions.names.get(key)
        if name is None:
            name = self._definitions.names[key] = f"d{len(self._definitions.names)}"
            self._to_visit.append((name, target, around))
        return f"#/$defs/{name}"

    # arrays and objects: what they contain is not combined with anything

    def _items(self, location: Location, out: Node, depth: int) -> None:
        node = location.node
        prefix, rest = node.get("prefixItems"), node.get("items", node.get("unevaluatedItems"))
        if isinstance(rest, list):  # as drafts before 2020-12 write tuples
            prefix, rest = rest, node.get("additionalItems")
        if prefix is not None:
            out["prefixItems"] = [
                self._schema(location.inner(item), Declared(), depth + 1)
                for item in expect(list, prefix, "prefixItems")
            ]
            if rest is None and out.get("minItems", 0) <= len(prefix):
                rest = False
        if rest is not None:
            out["items"] = self._schema(location.inner(rest), Declared(), depth + 1)

    def _keys(self, location: Location, out: Node, depth: int) -> None:
        for keyword in ("properties", "patternProperties"):
            if location.node.get(keyword) is not None:
                given = expect(dict, location.node[keyword], keyword)
                out[keyword] = {
                    key: self._schema(location.inner(value), Declared(), depth + 1) for key, value in given.items()
                }
        rest = location.node.get("additionalProperties", location.node.get("unevaluatedProperties"))
        if rest is not None and ("additionalProperties" in location.node or not combined(location.node)):
            out["additionalProperties"] = self._schema(location.inner(rest), Declared(), depth + 1)

    # combinations: their parts describe the same value

    def _parts(self, location: Location, out: Node, depth: int) -> None:
        """`allOf` and what else must hold: not closed one by one, because the whole is."""
        parts = [self._schema(part, None, depth + 1) for part in self._all_of(location)]
        parts += [{"anyOf": branches} for branches in out.pop("more anyOf", [])]
        if parts:
            out["allOf"] = parts

    def _branches(self, location: Location, out: Node, around: Declared | None, depth: int) -> bool:
        """`anyOf` and `oneOf`: each branch is closed by itself, with the keys declared around it."""
        groups = [
            [location.inner(branch) for branch in expect(list, location.node[k], k)]
            for k in BRANCHES
            if k in location.node
        ]
        for index, group in enumerate(groups):
            others = [branch for other, branches in enumerate(groups) if other != index for branch in branches]
            declared = None if around is None else around | self._any_of(others)
            branches = [self._schema(branch, declared, depth + 1) for branch in group]
            if index:
                out["more anyOf"] = [branches]
            else:
                out["anyOf"] = branches
        return bool(groups)

    def _all_of(self, location: Location) -> Iterable[Location]:
        for part in expect(list, location.node.get("allOf", []), "allOf"):
            yield location.inner(part)
        if "$ref" in location.node:
            yield self._references.target(location, location.node["$ref"])

    # declared keys

    def _own(self, location: Location) -> Declared:
        """The keys declared by a schema and by all that must hold with it, branches of those included."""
        node = location.node
        if not isinstance(node, dict):
            return Declared()
        known = self._declared.get(id(node))
        if known is not None:
            return known
        self._declared[id(node)] = Declared()  # while it is computed, for a schema that contains itself
        given = {key: value for key, value in node.items() if not (value is None and key in UNSET)}
        properties = expect(dict, given.get("properties", {}), "properties")
        found = Declared(
            frozenset(properties) | frozenset(filter(is_text, expect(list, given.get("required", []), "required"))),
            frozenset(expect(dict, given.get("patternProperties", {}), "patternProperties")),
            "properties" in given or "patternProperties" in given,
            "additionalProperties" in node or node.get("unevaluatedProperties", False) is not False,
        )
        for part in self._all_of(location):
            found |= self._own(part) | self._any_of(self._branches_of(part))
        self._declared[id(node)] = found
        return found

    def _branches_of(self, location: Location) -> list[Location]:
        if not isinstance(location.node, dict):
            return []
        return [location.inner(branch) for key in BRANCHES for branch in expect(list, location.node.get(key, []), key)]

    def _any_of(self, branches: Iterable[Location]) -> Declared:
        found = Declared()
        for branch in branches:
            found |= self._own(branch) | self._any_of(self._branches_of(branch))
        return found


def close_object(node: Node, out: Node, declared: Declared) -> None:
    """Have the object take no keys but the declared ones."""
    closed = node.get("unevaluatedProperties") is False
    if "additionalProperties" in out or declared.decides_others or not (declared.any_keys or closed):
        return
    if not may_be("object", node):
        return
    properties = out.get("properties", {})
    out["properties"] = properties | {name: True for name in sorted(declared.names) if name not in properties}
    if declared.patterns:
        patterns = out.get("patternProperties", {})
        out["patternProperties"] = patterns | {name: True for name in declared.patterns if name not in patterns}
    out["additionalProperties"] = False


def refuse_unsupported(node: Node) -> None:
    """Raise ValueError with the first keyword that constrains and is not supported."""
    for keyword, constrains in UNSUPPORTED.items():
        if keyword in node and constrains(node):
            raise ValueError(f"the keyword {keyword} is not supported")
    rest = node.get("unevaluatedProperties")
    if rest not in (None, True, False) and combined(node):
        raise ValueError("the keyword unevaluatedProperties with a schema is not supported beside combinations")


def refuse_wrong_types(out: Node) -> None:
    """Raise ValueError for a keyword whose value is of a type that it cannot have, where we look at the value."""
    for keyword, (fits, kind) in WELL_FORMED.items():
        if keyword in out and not fits(out[keyword]):
            raise ValueError(f"{keyword} must be {kind}")


def combined(node: Node) -> bool:
    return any(key in node for key in ("allOf", "anyOf", "oneOf", "$ref"))


def is_reference_alone(node: Node) -> bool:
    """Whether the node is a reference and has no other keyword that constrains."""
    others = {
        *COPIED,
        *OBJECT_KEYWORDS,
        *BRANCHES,
        "allOf",
        "items",
        "prefixItems",
        "minProperties",
        "maxProperties",
        "format",
    }
    return "$ref" in node and node.keys().isdisjoint(others | {"unevaluatedProperties"})


def convert_exclusive_bounds(node: Node, out: Node) -> None:
    """Exclusive bounds of draft 4, which are booleans, become numbers."""
    for bound, exclusive in (("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")):
        if isinstance(node.get(exclusive), bool):
            del out[exclusive]
            if node[exclusive] and bound in out:
                out[exclusive] = out.pop(bound)


def add_key_counts(node: Node, out: Node) -> None:
    """`minProperties` and `maxProperties`, unless the declared keys imply them."""
    least, most = whole(node.get("minProperties")), whole(node.get("maxProperties"))
    if least is not None and not (isinstance(least, int) and least <= len(out.get("required", []))):
        out["minProperties"] = least
    closed = out.get("additionalProperties") is False and not out.get("patternProperties")
    if most is not None and not (closed and isinstance(most, int) and len(out.get("properties", {})) <= most):
        out["maxProperties"] = most


def may_be(kind: str, node: Node) -> bool:
    kinds = node.get("type", kind)
    return kind in kinds if isinstance(kinds, list) else kinds == kind


def whole(value: Any) -> Any:
    """A count as the engine takes it: 2.0 is 2, as in JSON schemas, and some clients write every number so."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def is_text(value: Any) -> bool:
    return isinstance(value, str)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def are_texts(value: Any) -> bool:
    return isinstance(value, list) and all(map(is_text, value))


# Keywords whose values are read here or where calls are written between tags: what fits, in words.
WELL_FORMED: dict[str, tuple[Callable[[Any], bool], str]] = {
    "type": (lambda value: is_text(value) or are_texts(value), "a string or a list of strings"),
    "enum": (lambda value: isinstance(value, list), "a list"),
    "required": (are_texts, "a list of strings"),
    "minItems": (is_number, "a whole number, 0 or more"),
    **dict.fromkeys(NUMBERS, (is_number, "a number")),
    "multipleOf": (lambda value: is_number(value) and value > 0, "a number above 0"),
}


def expect(kind: type[Any], value: Any, keyword: str) -> Any:
    if not isinstance(value, kind):
        raise ValueError(f"{keyword} must be {'an object' if kind is dict else 'a list'}")
    return value
