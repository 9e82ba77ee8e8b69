"""A jinja2 environment for chat templates that nobody vouches for: no way out, and a budget for time and size.

Jinja2's immutable sandbox closes the way to Python's internals; it bounds neither time nor memory. Here every turn of
a loop, every call, every filter and every growing operation goes through a `Meter`, so a render ends soon after its
budget is spent, on any thread and with no signal. Templates are rewritten once, when they are compiled: the iterable
of a `for` and the operands of `~` become filters of the environment.
"""

import functools
import json
import re
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from string import Formatter
from typing import Any

import jinja2.ext
from jinja2 import nodes
from jinja2.exceptions import SecurityError, TemplateError
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

MAX_WORK = 1 << 28  # characters that one operation may touch or make before its result is measured
MAX_INDENT = 32
MAX_INTEGER_BITS = 4096
# A width of 10,000 or more, or one taken from an argument, in `%` formats and in str.format.
WIDE_PERCENT = re.compile(r"%[^a-zA-Z%]*(\d{5}|\*)")
WIDE_FIELD = re.compile(r"\d{5}|\{")

TOO_WIDE = "a width in a format is too large for the chat template's sandbox"

REFUSED_FILTERS = ("urlize", "xmlattr", "pprint")
REFUSED_METHODS = frozenset({"expandtabs", "translate", "maketrans", "format_map"})


class TextTooLong(TemplateError):
    """A render made a text of more characters than it may."""


class ConversationRefused(TemplateError):
    """The template's own code refuses the conversation."""


class Meter(threading.local):
    """What is left of one render's budget. Raises TemplateError once it is spent."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self.clock = clock
        self.budget_s = 0.0
        self.ends_at = float("inf")
        self.max_chars = 1 << 20  # what is folded when a template is compiled

    def start(self, budget_s: float, max_chars: int) -> None:
        self.budget_s, self.max_chars = budget_s, max_chars
        self.ends_at = self.clock() + budget_s

    def tick(self) -> None:
        if self.clock() > self.ends_at:
            raise TemplateError(f"the chat template took more than {self.budget_s * 1000:.0f} ms")

    def size(self, chars: int) -> None:
        if chars > self.max_chars:
            raise TextTooLong(f"the chat template made a text of more than {self.max_chars} characters")

    def loop(self, items: Iterable[Any]) -> Iterator[Any]:
        """The same items, one tick each."""
        for item in items:
            self.tick()
            yield item

    def join(self, parts: Iterable[Any], separator: str = "") -> str:
        """`separator.join(parts)`, refused before it is built when it is too long."""
        texts, total = [], 0
        for part in self.loop(parts):
            texts.append(str(part))
            total += len(texts[-1]) + len(separator)
            self.size(total)
        return separator.join(texts)

    def arguments(self, value: Any, args: Iterable[Any]) -> None:
        """Refuse an integer argument that, as a width or a count, would blow `value` up."""
        length = len(value) if isinstance(value, str | list | tuple) else 1
        for number in args:
            if isinstance(number, int) and abs(number) * max(length, 1) > MAX_WORK:
                raise TemplateError(f"{number} is too large for the chat template's sandbox")

    def result(self, value: Any) -> Any:
        if isinstance(value, str | list | tuple):
            self.size(len(value))
        return value

    def replace(self, text: str, old: Any, new: Any, count: Any = None) -> str:
        old, new = str(old), str(new)
        self.size(len(text) + (text.count(old) if old else len(text) + 1) * max(len(new) - len(old), 0))
        return text.replace(old, new, -1 if count is None else count)


class _Metering(NodeTransformer):
    """Sends loops and concatenations through the environment's own filters."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node.iter, "_loop")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        return _filter(nodes.List(node.nodes, lineno=node.lineno, environment=node.environment), "_concat")


def _filter(value: nodes.Node, name: str) -> nodes.Filter:
    assert isinstance(value, nodes.Expr), value
    return nodes.Filter(value, name, [], [], None, None, lineno=value.lineno, environment=value.environment)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the model wrote, for training; serving renders its body and nothing else."""

    tags = {"generation"}

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        return nodes.Scope(parser.parse_statements(("name:endgeneration",), drop_needle=True), lineno=line)


class _Scratch(Namespace):
    """jinja2's `namespace`, without underscored attributes."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # so that `self` is free as a keyword
        Namespace.__init__(*args, **kwargs)
        for name in dict(*args[1:], **kwargs):
            _check_name(name)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        Namespace.__setitem__(self, name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise SecurityError(f"a namespace in a chat template has no attribute {name!r}")


def _check_percent(text: str) -> None:
    if WIDE_PERCENT.search(text):
        raise TemplateError(TOO_WIDE)


def _check_braces(text: str) -> None:
    """Read as str.format does, once from the left; what it cannot read is its own error."""
    for _, field, spec, _ in Formatter().parse(text):
        if WIDE_FIELD.search(field or "") or WIDE_FIELD.search(spec or ""):
            raise TemplateError(TOO_WIDE)


def _raise_exception(message: str) -> None:
    raise ConversationRefused(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """JSON as Hugging Face templates expect it: no HTML escapes, no escapes of other scripts."""
    if indent is not None and (not isinstance(indent, int) or indent > MAX_INDENT):
        raise TemplateError(f"tojson indents by an integer of at most {MAX_INDENT}")
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


class ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that every chat template is compiled in."""

    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def __init__(self, clock: Callable[[], float] = time.thread_time) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols])
        self.meter = Meter(clock)
        self.concat = self.meter.join  # type: ignore[method-assign]
        self.filters["tojson"] = _tojson
        for name in REFUSED_FILTERS:
            del self.filters[name]
        self.filters |= {name: self._metered(name, function) for name, function in self.filters.items()}
        self.filters |= {"_loop": self.meter.loop, "_concat": self.meter.join}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Scratch}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Metering().visit(super()._parse(source, name, filename))
        return tree

    def _metered(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The filter, with its arguments checked before and its result after."""
        leading = 1 if hasattr(function, "jinja_pass_arg") else 0  # context, eval context or environment

        @functools.wraps(function)
        def metered(*args: Any, **kwargs: Any) -> Any:
            self.meter.tick()
            value, rest = args[leading], (*args[leading + 1 :], *kwargs.values())
            self.meter.arguments(value, rest)
            if name == "join":
                value = [*self.meter.loop(value)]
                self.meter.join(value, str(args[leading + 1] if len(args) > leading + 1 else kwargs.get("d", "")))
            if name == "replace":
                self.meter.replace(str(value), *rest[:2])
            if name == "format":
                _check_percent(str(value))
            return self.meter.result(function(*args[:leading], value, *args[leading + 1 :], **kwargs))

        return metered

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in REFUSED_METHODS and super().is_safe_attribute(obj, attr, value)

    def wrap_str_format(self, value: Any) -> Callable[..., str] | None:
        wrapped = super().wrap_str_format(value)
        if wrapped is not None:
            _check_braces(value.__self__)
        return wrapped

    def call(__self, __context: Context, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        """Every call that a template makes: the meter first, then the sandbox."""
        meter = __self.meter
        meter.tick()
        owner, name = getattr(__obj, "__self__", None), getattr(__obj, "__name__", "")
        meter.arguments(owner, (*args, *kwargs.values()))
        if isinstance(owner, str) and name in ("join", "replace"):
            return meter.join(args[0], owner) if name == "join" else meter.replace(owner, *args, **kwargs)
        return meter.result(super().call(__context, __obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`+`, `*`, `**` and `%`: the operators whose result can be far larger than what goes in."""
        self.meter.tick()
        if operator == "%" and isinstance(left, str):
            _check_percent(left)
        if operator in ("*", "**"):
            self._check_product(operator, left, right)
        return self.meter.result(super().call_binop(context, operator, left, right))

    def _check_product(self, operator: str, left: Any, right: Any) -> None:
        for text, times in ((left, right), (right, left)):
            if isinstance(text, str | list | tuple) and isinstance(times, int):
                self.meter.size(len(text) * times)
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * right if operator == "**" else left.bit_length() + right.bit_length()
            if bits > MAX_INTEGER_BITS:
                raise TemplateError("a number is too large for the chat template's sandbox")
