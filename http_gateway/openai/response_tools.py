"""The tools of a request of /v1/responses as the functions of a chat completion, and their names in the answer."""

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import msgspec

from quartet.http_gateway.openai.chat_body import check_tool_names
from quartet.http_gateway.openai.response_types import ResponsesBody
from quartet.http_gateway.openai.types import NamedFunction, NamedTool
from quartet.http_gateway.parsers.tool_events import Function, Tool
from quartet.runtime.errors import RequestError
from quartet.runtime.shorten import short

log = logging.getLogger(__name__)

# Hosted tools that coding agents offer beside their own functions with every request, whoever serves it.
EXTRAS = (
    "web_search",
    "web_search_2025_08_26",
    "web_search_preview",
    "web_search_preview_2025_03_11",
    "image_generation",
    "tool_search",
    "local_shell",
)
BETWEEN = "__"  # a namespace and the name of its function
UNREAD = re.compile(r"[^\w.-]")  # is in no name that the formats of calls can all carry
MOST_NAMESPACE_CHARS = 128  # each of its functions is given the name, and calls with long ones are not read
MOST_NAMED = 8  # hosted tools in the header Warning: clients refuse long headers
REFUSED = (
    "{}: tools of type {!r} are not supported, only functions and namespaces of functions: the server runs no tools."
)
MAY_BE_LEFT_OUT = " With --leave-out-hosted-tools it leaves this one out where there are functions too."
LEFT_OUT = '299 quartet "left out, for the server runs no tools: {}"'  # the header Warning


class FullName(NamedTuple):
    """What a function of a namespace is called in this API."""

    namespace: str
    name: str


@dataclass(frozen=True)
class Offered:
    """What the model is offered."""

    functions: list[Tool]
    choice: Any  # as a chat completion has it
    full_names: Mapping[str, FullName]  # by the name that the model sees
    shown: list[dict[str, Any]]  # the tools of the request that the model sees, for the answer
    left_out: list[str]  # the others

    def headers(self) -> dict[str, str]:
        """Headers of the answer."""
        if not self.left_out:
            return {}
        more = len(self.left_out) - MOST_NAMED
        named = ", ".join(self.left_out[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")
        return {"warning": LEFT_OUT.format(named)}


def offered(body: ResponsesBody, leave_out: bool) -> Offered:
    """The functions that the model may call, those of namespaces too. Raises RequestError.

    The server runs no tools, so a hosted one is refused. With `leave_out` (--leave-out-hosted-tools), those in EXTRAS
    are left out where the request has functions as well, and the answer says so: agents offer them to every server.
    """
    given = dict(enumerate(body.tools or ()))
    extras = {index: tool["type"] for index, tool in given.items() if tool.get("type") in EXTRAS}
    if not leave_out or not any(map(has_functions, given.values())):
        extras = {}
    shown = {index: tool for index, tool in given.items() if index not in extras}
    functions: list[Tool] = []
    full_names: dict[str, FullName] = {}
    for index, tool in shown.items():
        if tool.get("type") == "namespace":
            found = namespaced(tool, f"tools[{index}]")
            full_names |= {function.name: full for full, function in found}
            functions += [Tool(function) for _, function in found]
        else:
            hint = MAY_BE_LEFT_OUT if tool.get("type") in EXTRAS else ""
            functions.append(Tool(function_of(tool, f"tools[{index}]", hint)))
    check_tool_names(functions)
    for kind in extras.values():
        tell_once(kind)
    kept, choice = chosen(functions, body.tool_choice)
    left_out = [f"tools[{index}] ({kind})" for index, kind in extras.items()]
    return Offered(kept, choice, full_names, list(shown.values()), left_out)


def has_functions(tool: Mapping[str, Any]) -> bool:
    """Whether a tool is a function, or a namespace of some."""
    return tool.get("type") == "function" or (tool.get("type") == "namespace" and bool(tool.get("tools")))


@cache
def tell_once(kind: str) -> None:
    """Log that tools of a type are left out."""
    log.warning(
        "Tools of type %r, which clients offer beside their functions, are left out: the server runs none.", kind
    )


def namespaced(tool: Mapping[str, Any], where: str) -> list[tuple[FullName, Function]]:
    """The functions of a namespace, each under the name that the model sees. Raises RequestError."""
    name, tools = tool.get("name"), tool.get("tools")
    if not isinstance(name, str) or not name:
        raise RequestError(f"{where}: a namespace needs a name.", field="tools")
    if len(name) > MOST_NAMESPACE_CHARS:
        raise RequestError(
            f"{where}: the name of a namespace has {MOST_NAMESPACE_CHARS} characters at most, got {len(name)}.",
            field="tools",
        )
    if not isinstance(tools, list) or not all(isinstance(inner, dict) for inner in tools):
        raise RequestError(f"{where}: tools must be a list of functions.", field="tools")
    found = []
    for index, inner in enumerate(tools):
        function = function_of(inner, f"{where}.tools[{index}]")
        full = FullName(name, function.name)
        found.append((full, msgspec.structs.replace(function, name=seen_name(*full))))
    return found


def seen_name(namespace: str | None, name: str) -> str:
    """The name of a function that the model sees: a namespace may have a slash or a blank, names in calls may not."""
    return f"{UNREAD.sub('_', namespace).rstrip('_')}{BETWEEN}{name}" if namespace else name


def function_of(tool: Mapping[str, Any], where: str, hint: str = "") -> Function:
    """A function tool. Raises RequestError for every other kind; `hint`: what else there is to say of that kind."""
    if tool.get("type") != "function":
        raise RequestError(REFUSED.format(where, short(str(tool.get("type")))) + hint, field="tools")
    try:
        return msgspec.convert(tool, Function)
    except msgspec.ValidationError as error:
        raise RequestError(f"{where}: {error}", field="tools") from None


def chosen(tools: list[Tool], choice: Any) -> tuple[list[Tool], Any]:
    """The tools that `tool_choice` leaves, and it as a chat completion has it. Raises RequestError."""
    if not isinstance(choice, dict):
        return tools, choice
    kind = choice.get("type")
    if kind == "function" and isinstance(choice.get("name"), str):
        return tools, NamedTool(NamedFunction(name_in(choice)))
    if kind == "allowed_tools" and choice.get("mode") in ("auto", "required"):
        return allowed(tools, choice.get("tools")), choice["mode"]
    raise RequestError(
        "tool_choice must be none, auto, required, {type: function, name} or {type: allowed_tools, mode, tools}: "
        "hosted tools are not supported.",
        field="tool_choice",
    )


def allowed(tools: list[Tool], chosen: Any) -> list[Tool]:
    """Those of the tools that `allowed_tools` names. Raises RequestError."""
    by_name = {tool.function.name: tool for tool in tools}
    names = []
    for tool in chosen if isinstance(chosen, list) else ():
        name = tool.get("name") if isinstance(tool, dict) else None
        name = name_in(tool) if isinstance(name, str) else name
        if not isinstance(name, str) or name not in by_name:
            kind = tool.get("type") if isinstance(tool, dict) else tool
            unknown = short(kind if name is None else name)  # hosted tools have no names
            raise RequestError(f"tool_choice: tool {unknown!r} not found in tools list.", field="tool_choice")
        names.append(name)
    if not names:
        raise RequestError("tool_choice: tools must name functions: {type: function, name}.", field="tool_choice")
    return [by_name[name] for name in dict.fromkeys(names)]


def name_in(named: Mapping[str, Any]) -> str:
    """The name that the model sees of the function that a call or a choice names."""
    namespace = named.get("namespace")
    return seen_name(namespace if isinstance(namespace, str) else None, named["name"])
