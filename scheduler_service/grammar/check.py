"""A small process that reads a client's grammar before the scheduler does, and that may die of it.

Some texts keep a parser or the engine busy for hours, and a thread cannot be stopped. So everything that looks at a
grammar's text happens here first, in a process with a budget (runtime/process/guarded.py): it is translated for the
engine and tried. What comes back was bearable once and is so again in the scheduler.
"""

import sys

import msgspec
from llguidance import LLMatcher, LLParserLimits

from quartet.runtime import limits
from quartet.runtime.process import guarded
from quartet.scheduler_service.grammar.source import source

MAX_PROBLEM_CHARS = 500
MODULE = "quartet.scheduler_service.grammar.check"


class Order(msgspec.Struct):
    """A grammar as a client wrote it."""

    kind: str
    text: str
    special_tokens: dict[str, int] = {}  # text → id


class Verdict(msgspec.Struct, omit_defaults=True):
    """What the engine is to be given, or why it is not."""

    grammar: str = ""
    problem: str = ""


def handle(order: bytes) -> bytes:
    return msgspec.msgpack.encode(verdict(msgspec.msgpack.decode(order, type=Order)))


def verdict(order: Order) -> Verdict:
    """Translate a grammar and try it."""
    try:
        grammar = source(order.kind, order.text, order.special_tokens)
    except (ValueError, RecursionError) as error:
        return Verdict(problem=shortened(str(error)))
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(verbose_errors=False))
    if failed:
        return Verdict(problem=shortened(messages[0]))
    if len(grammar) > limits.MAX_GRAMMAR_SOURCE_CHARS:
        return Verdict(problem="it is too large when it is written out")
    return Verdict(grammar=grammar)


def shortened(problem: str) -> str:
    return problem.replace("<non-verbose/>", "").strip()[:MAX_PROBLEM_CHARS]


def main() -> None:
    guarded.serve(int(sys.argv[1]), lambda setup: handle, limits.GRAMMAR_MEMORY_BYTES, limits.GRAMMAR_STACK_BYTES)


if __name__ == "__main__":
    main()
