"""A small process that reads a client's grammar before the scheduler does, and that may crash on it.

Some texts keep a parser or the engine busy for hours, and a thread cannot be stopped. So everything that reads the
text of a grammar is done here first, in a process with limits of time and memory (runtime/process/guarded.py): the
grammar is translated for the engine and tried. What passes costs no more in the scheduler than it did here.
"""

import sys

import msgspec
from llguidance import LLMatcher, LLParserLimits

from quartet.runtime import limits
from quartet.runtime.process import guarded
from quartet.scheduler_service.grammar.calls import from_calls
from quartet.scheduler_service.grammar.source import source

MAX_PROBLEM_CHARS = 500
MODULE = "quartet.scheduler_service.grammar.check"


class CheckRequest(msgspec.Struct):
    """A grammar as a client wrote it."""

    kind: str
    text: str
    special_tokens: dict[str, int] = {}  # text → id


class CheckResult(msgspec.Struct, omit_defaults=True):
    """The grammar for the engine, or what is wrong with it."""

    grammar: str = ""
    problem: str = ""


def handle(request: bytes) -> bytes:
    return msgspec.msgpack.encode(check_grammar(msgspec.msgpack.decode(request, type=CheckRequest)))


def check_grammar(request: CheckRequest) -> CheckResult:
    """Translate a grammar and try it."""
    try:
        if request.kind == "call_grammar":
            grammar = from_calls(request.text, request.special_tokens)
        else:
            grammar = source(request.kind, request.text, request.special_tokens)
    except (ValueError, RecursionError) as error:
        return CheckResult(problem=shortened(str(error)))
    failed, messages = LLMatcher.validate_grammar_with_warnings(grammar, limits=LLParserLimits(verbose_errors=False))
    if failed:
        return CheckResult(problem=shortened(messages[0]))
    if len(grammar) > limits.MAX_GRAMMAR_SOURCE_CHARS:
        return CheckResult(problem="it is too large when it is written out")
    return CheckResult(grammar=grammar)


def shortened(problem: str) -> str:
    return problem.replace("<non-verbose/>", "").strip()[:MAX_PROBLEM_CHARS]


def main() -> None:
    guarded.serve(int(sys.argv[1]), lambda setup: handle, limits.GRAMMAR_MEMORY_BYTES, limits.GRAMMAR_STACK_BYTES)


if __name__ == "__main__":
    main()
