"""Resolves the references of a JSON schema: to a path in their own resource, to an anchor, to a resource by its $id."""

from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

Node = dict[str, Any]


class Location(NamedTuple):
    """A subschema, and the resources and definitions that contain it, from the root on."""

    node: Any
    around: tuple[Node, ...] = ()

    def inner(self, node: Any) -> "Location":
        """A subschema of this one."""
        opens = isinstance(self.node, dict) and not self.node.keys().isdisjoint(("$id", "$defs", "definitions"))
        return Location(node, (*self.around, self.node) if opens or not self.around else self.around)


class References:
    """Resolves the references of one schema. Raises ValueError for those that point to nothing."""

    def __init__(self, root: Node) -> None:
        self._named: dict[str, Location] = {}  # by $id, and by $id#anchor
        self._index(Location(root))

    def _index(self, start: Location) -> None:
        to_visit = [(start, "")]
        while to_visit:
            location, base = to_visit.pop()
            node = location.node
            if isinstance(node, dict):
                base = self._name(location, base)
                to_visit += [(location.inner(value), base) for value in node.values()]
            elif isinstance(node, list):
                to_visit += [(location._replace(node=value), base) for value in node]

    def _name(self, location: Location, base: str) -> str:
        identity, anchor = location.node.get("$id"), location.node.get("$anchor")
        if isinstance(identity, str):
            base = urljoin(base, identity)
            self._named.setdefault(base.removesuffix("#"), location)
        if isinstance(anchor, str):
            self._named.setdefault(f"{base.removesuffix('#')}#{anchor}", location)
        return base

    def target(self, location: Location, reference: Any) -> Location:
        """The subschema that a reference at this location points to."""
        if not isinstance(reference, str):
            raise ValueError("$ref must be a string")
        address, _, fragment = reference.partition("#")
        resources = [node for node in (*location.around, location.node) if isinstance(node, dict) and "$id" in node]
        base = ""
        for node in resources:
            base = urljoin(base, str(node["$id"]))
        if address:
            named = self._named.get(urljoin(base, address))
            if named is None:
                raise ValueError(f"the reference {reference!r} leads out of the schema")
            starts = [named]
        else:
            starts = self._starts(location)
        if fragment and not fragment.startswith("/"):
            found = self._named.get(f"{(urljoin(base, address) if address else base).removesuffix('#')}#{fragment}")
            candidates = [] if found is None else [found]
        else:
            candidates = [found for start in starts if (found := follow(start, fragment)) is not None]
        if not candidates:
            raise ValueError(f"the reference {reference!r} leads nowhere")
        return candidates[0]

    def _starts(self, location: Location) -> list[Location]:
        """Where a pointer may begin: at the resource that contains it first, as the standard says."""
        around = [Location(node, location.around[:depth]) for depth, node in enumerate(location.around)]
        around = [*around, location]
        resources = [start for start in around if isinstance(start.node, dict) and "$id" in start.node]
        first = resources[-1:] or around[:1]
        return first + [start for start in reversed(around) if start not in first]


def follow(start: Location, pointer: str) -> Location | None:
    """The location that a JSON pointer leads to, or None."""
    location = start
    for raw in pointer.split("/")[1:]:
        key = unquote(raw).replace("~1", "/").replace("~0", "~")
        node = location.node
        if isinstance(node, dict) and key in node:
            location = location.inner(node[key])
        elif isinstance(node, list) and key.isdecimal() and len(key) < 10 and int(key) < len(node):
            location = location._replace(node=node[int(key)])
        else:
            return None
    return location
