"""Which fields a route's body has that take text or lists, and bodies of a chosen size for each of them."""

from collections.abc import Callable, Iterator
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import msgspec
from msgspec import inspect

from quartet.http_gateway.app import ENDPOINTS
from quartet.http_gateway.routes.endpoint import Endpoint
from quartet.runtime.sampling import SamplingParams

Path = tuple[str | int, ...]

DEEPEST = 4  # structs inside structs

# Bodies that are served when a field is laid over them. What is not here is sent with the field alone.
BASES: dict[str, dict[str, Any]] = {
    "GenerateBody": {"text": "The", "sampling_params": {"max_new_tokens": 1}},
    "VertexBody": {"instances": [{"text": "The"}], "parameters": {"max_new_tokens": 1}},
    "CompletionBody": {"prompt": "The", "max_tokens": 1},
    "ChatBody": {"messages": [{"role": "user", "content": "The"}], "max_tokens": 1},
    # not stored: the store's cost depends on what it throws away, its own test counts the bytes that it writes
    "ResponsesBody": {"input": "The", "max_output_tokens": 1, "store": False},
    "MessagesBody": {
        "messages": [{"role": "assistant", "content": "The"}, {"role": "user", "content": "The"}],
        "max_tokens": 1,
    },
    "ConversationBody": {"messages": [{"role": "assistant", "content": "The"}, {"role": "user", "content": "The"}]},
    "TokenizeBody": {"prompt": "The"},
    "DetokenizeBody": {"tokens": [5]},
    "ParseBody": {"text": "The", "tools": [], "tool_call_parser": "hermes"},
    "SeparateBody": {"text": "The", "reasoning_parser": "qwen3"},
    "ScoreBody": {"query": "The", "items": ["a"], "label_token_ids": [5]},
    "EncodeBody": {"text": "The"},
    "EmbeddingsBody": {"input": "The"},
    "ClassifyBody": {"input": "The"},
    "RerankBody": {"query": "The", "documents": ["a"]},
    "UpdateWeightVersion": {"new_version": "default", "abort_all_requests": False},
    "GetWeightsByName": {"name": "none"},
    "LoadAdapter": {"lora_name": "a", "lora_path": "/nowhere"},
    "LoadAdapterFromTensors": {"lora_name": "a", "config_dict": {}, "serialized_named_tensors": ["QUJD"]},
    "UnloadAdapter": {"lora_name": "a"},
}
EITHER = [{"text", "input_ids", "input_embeds"}, {"prompt", "messages"}]  # one of them makes a body
# What the types leave open (dict[str, Any]), and what stands there.
OPEN: dict[str, Any] = {"sampling_params": SamplingParams, "parameters": SamplingParams}
MESSAGE = {"role": "user", "content": ""}
USE = {"type": "tool_use", "id": "t", "name": "f", "input": {}}
# What stands around a field in a list of blocks, by the field.
BLOCKS: dict[str | int, dict[str, Any]] = {
    "text": {"type": "text"},
    "thinking": {"type": "thinking"},
    "signature": {"type": "thinking", "thinking": "a"},
    "data": {"type": "redacted_thinking"},
    **dict.fromkeys(("id", "name", "input"), USE),
    **{name: {"type": "tool_result", "tool_use_id": "t"} for name in ("tool_use_id", "content")},
}
TOOL = {"name": "f", "input_schema": {}}
# These wait for something, or end what others do.
LEFT_OUT = {
    "/pause_generation",
    "/continue_generation",
    "/release_memory_occupation",
    "/resume_memory_occupation",
    "/init_weights_update_group",
    "/destroy_weights_update_group",
    "/update_weights_from_distributed",
    "/load_lora_adapter_from_distributed",
    "/begin_weight_update",
    "/end_weight_update",
    "/slow_down",
}

Filling = Callable[[int], Any]


def repeated(unit: str) -> Filling:
    width = len(msgspec.json.encode(unit)) - 2
    return lambda size: unit * (size // width)


def listed(item: Any) -> Filling:
    width = len(msgspec.json.encode(item)) + 1
    return lambda size: [item] * (size // width)


FILLINGS: dict[str, dict[str, Filling]] = {
    "text": {
        "words": repeated("The quick brown fox. "),
        "blanks": lambda size: " " * size + "x",
        "letters": repeated("a"),
        "brackets": repeated('[{"'),
    },
    "anything": {"lists": listed([1])},
    "ids": {"ids": listed(12345 % 2000)},
    "strings": {"strings": listed("a"), "long strings": listed("The quick brown fox. " * 400)},
    "lists": {"lists": listed([1]), "long lists": listed([5] * 1000)},
    "objects": {"objects": listed({"a": 1})},
    "keys": {"keys": lambda size: {f"k{i}": 1 for i in range(size // 12)}},
    "numbers": {"numbers by id": lambda size: {str(i): 1.0 for i in range(size // 12)}},
}


@dataclass(frozen=True)
class Field:
    """A field of a route with something to fill it."""

    route: Endpoint
    path: Path
    filling: str
    fill: Filling

    @property
    def name(self) -> str:
        return ".".join(map(str, self.path))

    def body(self, size: int) -> bytes:
        """About `size` bytes."""
        body = msgspec.json.decode(msgspec.json.encode(BASES.get(self.route.body.__name__, {})))
        for group in EITHER:
            if self.path[0] in group:
                for other in group - {self.path[0]}:
                    body.pop(other, None)
        put(body, self.path, self.fill(size))
        return msgspec.json.encode(body)


def put(body: Any, path: Path, value: Any) -> None:
    """Lay a value over a body, with what has to stand around it."""
    listed = ""  # the name of the list that is entered
    for here, following in pairwise(path):
        missing: Any = [] if isinstance(following, int) else {}
        if isinstance(here, int):
            if len(body) <= here:
                body.append(item_around(listed, following) if missing == {} else missing)
        elif not isinstance(body.get(here), type(missing)):
            body[here] = missing
        body, listed = body[here], str(here)
    last = path[-1]
    if isinstance(last, int):
        body[last:] = [value]
    else:
        body[last] = value


def item_around(listed: str, field: str | int) -> dict[str, Any]:
    """What has to stand around a field of an item of a list of this name."""
    if listed in ("content", "system"):
        return deepcopy(BLOCKS.get(field, MESSAGE))
    return deepcopy(TOOL if listed == "tools" and field != "function" else MESSAGE)


def found_in(kind: Any, path: Path = (), depth: int = 0) -> Iterator[tuple[Path, str]]:
    """(where, which kind of filling) of everything in a type that can be long."""
    if depth > DEEPEST:
        return
    match kind:
        case inspect.UnionType(types=types):
            for member in types:
                yield from found_in(member, path, depth)
        case inspect.StrType():
            yield path, "text"
        case inspect.ListType(item_type=item):
            yield from found_in_list(item, path, depth)
        case inspect.DictType(value_type=inspect.FloatType()):
            yield path, "numbers"
        case inspect.DictType():
            yield from found_in_open(path, depth)
        case inspect.AnyType() | inspect.RawType():
            yield path, "anything"
        case inspect.StructType(fields=fields):
            for field in fields:
                yield from found_in(field.type, (*path, field.encode_name), depth + 1)


def found_in_list(item: Any, path: Path, depth: int) -> Iterator[tuple[Path, str]]:
    for member in item.types if isinstance(item, inspect.UnionType) else (item,):
        match member:
            case inspect.StrType() | inspect.RawType():
                yield path, "strings"
            case inspect.IntType() | inspect.FloatType():
                yield path, "ids"
            case inspect.ListType():
                yield path, "lists"
            case inspect.DictType():
                yield path, "objects"
                yield from found_in_open((*path, 0), depth)
            case inspect.StructType():
                yield path, "objects"
                yield from found_in(member, (*path, 0), depth)
            case inspect.AnyType():
                yield from ((path, kind) for kind in ("strings", "ids", "lists", "objects"))


def found_in_open(path: Path, depth: int) -> Iterator[tuple[Path, str]]:
    """What stands in an object that the types leave open."""
    yield path, "keys"
    names = [part for part in path if isinstance(part, str)]
    if names[-1] in OPEN:
        yield from found_in(inspect.type_info(OPEN[names[-1]]), path, depth + 1)
    if names[-1] in ("messages", "input"):
        yield from (((*path, "content"), "text"), ((*path, "content"), "objects"), ((*path, "name"), "text"))


def fields_of(route: Endpoint) -> list[Field]:
    """Every field of a route with every filling; none where the route takes no body or is left out."""
    if route.body is None or route.path in LEFT_OUT or not {"POST", "PUT"} & set(route.methods):
        return []
    places = dict.fromkeys(found_in(inspect.type_info(route.body)))
    hidden = {"id", "epoch", "attempt", "payload_files"}  # set by the gateway
    return [
        Field(route, path, name, fill)
        for path, kind in places
        if path and path[0] not in hidden
        for name, fill in FILLINGS[kind].items()
    ]


def all_fields(prefix: str = "") -> list[Field]:
    """Of all routes but aliases, in the order of the routes."""
    seen: set[tuple[Any, Any]] = set()
    found: list[Field] = []
    for route in ENDPOINTS:
        if (route.body, route.handler) not in seen and (not prefix or route.path == prefix):
            seen.add((route.body, route.handler))
            found += fields_of(route)
    return found
