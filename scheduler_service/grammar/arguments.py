"""The parameters that a normalised schema of an object declares, where they are written one by one."""

from typing import Any, NamedTuple

Node = dict[str, Any]
MAX_ALTERNATIVES = 32
MAX_DEPTH = 16


class Parameter(NamedTuple):
    """One parameter; without a name it is any that the schema does not declare."""

    name: str | None
    schema: Node  # complete: with the definitions that it refers to
    required: bool = False


def alternatives(schema: Node) -> list[list[Parameter]]:
    """The lists of parameters that an object of this schema may have; several where the schema has alternatives."""
    definitions = {"$defs": schema["$defs"]} if "$defs" in schema else {}
    options = {name: schema[name] for name in ("x-guidance",) if name in schema} | definitions
    shapes = _shapes({key: value for key, value in schema.items() if key not in options}, definitions, 0)
    if not shapes:
        raise ValueError("no object fits the parameters' schema")
    return [_parameters(shape, options) for shape in shapes]


def _shapes(node: Any, definitions: Node, depth: int) -> list[Node]:
    """Objects without combinations that together are what the node allows."""
    if depth > MAX_DEPTH:
        raise ValueError("the parameters' schema is nested too deeply")
    if node is False or (isinstance(node, dict) and "object" not in _types(node)):
        return []
    if node is True:
        return [{}]
    if "$ref" in node:
        target = definitions.get("$defs", {}).get(str(node["$ref"]).removeprefix("#/$defs/"))
        return _shapes(target, definitions, depth + 1)
    found = [{key: value for key, value in node.items() if key not in ("allOf", "anyOf")}]
    for part in node.get("allOf", ()):
        found = _products(found, _shapes(part, definitions, depth + 1))
    if "anyOf" in node:
        options = [shape for option in node["anyOf"] for shape in _shapes(option, definitions, depth + 1)]
        found = _products(found, options)
    return found


def _types(node: Node) -> Any:
    return node.get("type", "object")


def _products(left: list[Node], right: list[Node]) -> list[Node]:
    if len(left) * len(right) > MAX_ALTERNATIVES:
        raise ValueError(f"the parameters have more than {MAX_ALTERNATIVES} alternatives")
    return [_both(one, other) for one in left for other in right]


def _both(one: Node, other: Node) -> Node:
    properties = dict(one.get("properties", {}))
    for name, schema in other.get("properties", {}).items():
        properties[name] = {"allOf": [properties[name], schema]} if name in properties else schema
    extra = [part["additionalProperties"] for part in (one, other) if "additionalProperties" in part]
    return {
        "properties": properties,
        "required": [*one.get("required", ()), *other.get("required", ())],
        **({"additionalProperties": False if False in extra else extra[0]} if extra else {}),
    }


def _parameters(shape: Node, options: Node) -> list[Parameter]:
    properties, required = shape.get("properties", {}), set(shape.get("required", ()))
    extra = shape.get("additionalProperties", True)
    undeclared = [name for name in shape.get("required", ()) if name not in properties]
    if undeclared and extra is False:
        raise ValueError(f"the required parameter {undeclared[0]!r} is not declared")
    found = [Parameter(name, _whole(schema, options), name in required) for name, schema in properties.items()]
    found += [Parameter(name, _whole(extra, options), True) for name in dict.fromkeys(undeclared)]
    if not found and extra is not False:
        found.append(Parameter(None, _whole(extra, options)))
    for parameter in found:
        if parameter.schema.get("not") == {} and parameter.required:
            raise ValueError(f"no value fits the parameter {parameter.name!r}")
    return [parameter for parameter in found if parameter.schema.get("not") != {}]


def _whole(schema: Any, options: Node) -> Node:
    """A value's schema by itself."""
    if schema is False:
        return {"not": {}}
    return {**({} if schema is True else schema), **options}
