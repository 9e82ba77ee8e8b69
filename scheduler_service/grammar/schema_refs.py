"""Where the references of a JSON schema lead: into their own resource, to an anchor, to a resource by its $id."""

from typing import Any, NamedTuple
from urllib.parse import unquote, urljoin

Node = dict[str, Any]


class Place(NamedTuple):
    """A subschema, and the resources and definitions that it stands in, from the root on."""

    node: Any
    around: tuple[Node, ...] = ()

    def inner(self, node: Any) -> "Place":
        """A subschema of this one."""
        opens = isinstance(self.node, dict) and not self.node.keys().isdisjoint(("$id", "$defs", "definitions"))
        return Place(node, (*self.around, self.node) if opens or not self.around else self.around)


class References:
    """Resolves the references of one schema. Raises ValueError for those that lead nowhere."""

    def __init__(self, root: Node) -> None:
        self._named: dict[str, Place] = {}  # by $id, and by $id#anchor
        self._index(Place(root))

    def _index(self, start: Place) -> None:
        waiting = [(start, "")]
        while waiting:
            place, base = waiting.pop()
            node = place.node
            if isinstance(node, dict):
                base = self._name(place, base)
                waiting += [(place.inner(value), base) for value in node.values()]
            elif isinstance(node, list):
                waiting += [(place._replace(node=value), base) for value in node]

    def _name(self, place: Place, base: str) -> str:
        identity, anchor = place.node.get("$id"), place.node.get("$anchor")
        if isinstance(identity, str):
            base = urljoin(base, identity)
            self._named.setdefault(base.removesuffix("#"), place)
        if isinstance(anchor, str):
            self._named.setdefault(f"{base.removesuffix('#')}#{anchor}", place)
        return base

    def target(self, place: Place, reference: Any) -> Place:
        """The subschema that a reference at this place leads to."""
        if not isinstance(reference, str):
            raise ValueError("$ref must be a string")
        address, _, fragment = reference.partition("#")
        resources = [node for node in (*place.around, place.node) if isinstance(node, dict) and "$id" in node]
        base = ""
        for node in resources:
            base = urljoin(base, str(node["$id"]))
        if address:
            named = self._named.get(urljoin(base, address))
            if named is None:
                raise ValueError(f"the reference {reference!r} leads out of the schema")
            starts = [named]
        else:
            starts = self._starts(place)
        if fragment and not fragment.startswith("/"):
            found = self._named.get(f"{(urljoin(base, address) if address else base).removesuffix('#')}#{fragment}")
            candidates = [] if found is None else [found]
        else:
            candidates = [found for start in starts if (found := follow(start, fragment)) is not None]
        if not candidates:
            raise ValueError(f"the reference {reference!r} leads nowhere")
        return candidates[0]

    def _starts(self, place: Place) -> list[Place]:
        """From where a pointer may be meant: the resource it stands in first, as the standard has it."""
        around = [Place(node, place.around[:depth]) for depth, node in enumerate(place.around)]
        around = [*around, place]
        resources = [start for start in around if isinstance(start.node, dict) and "$id" in start.node]
        first = resources[-1:] or around[:1]
        return first + [start for start in reversed(around) if start not in first]


def follow(start: Place, pointer: str) -> Place | None:
    """The place that a JSON pointer leads to, or None."""
    place = start
    for raw in pointer.split("/")[1:]:
        key = unquote(raw).replace("~1", "/").replace("~0", "~")
        node = place.node
        if isinstance(node, dict) and key in node:
            place = place.inner(node[key])
        elif isinstance(node, list) and key.isdecimal() and len(key) < 10 and int(key) < len(node):
            place = place._replace(node=node[int(key)])
        else:
            return None
    return place
