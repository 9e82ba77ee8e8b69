"""Background compilation: one outcome per request, slow grammars do not delay other calls, an abort ends the work."""

import re
import threading
import time
from typing import Any

import pytest

from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.model_files.model_info import DEMO
from quartet.runtime.process.guarded import Gone, Guarded
from quartet.scheduler_service.grammar import check as grammar_check
from quartet.scheduler_service.grammar import matchers
from quartet.scheduler_service.grammar.ebnf import from_ebnf
from quartet.scheduler_service.grammar.matchers import GrammarCompiler, NeedsLongTry
from quartet.scheduler_service.grammar.pool import FairQueue, GrammarPool, Job
from quartet.scheduler_service.grammar.source import from_regex

BLANKS = 'root ::= "a"{1' + " " * 60_000 + "x"


class ScriptedCompiler:
    """Compiles each text when told to; `slow` ones need a long try."""

    def __init__(self) -> None:
        self.go = threading.Event()
        self.begun = threading.Event()
        self.tries: list[tuple[str, bool]] = []
        self.cache: dict[str, Any] = {}

    def known(self, kind: str, text: str) -> Any:
        return self.cache.get(text)

    def try_compile(self, kind: str, text: str, checker: Any, *, long: bool = False) -> Any:
        self.begun.set()
        assert self.go.wait(120)
        self.tries.append((text, long))
        if text.startswith("slow") and not long:
            raise NeedsLongTry
        if text == "bad":
            raise RequestError("Failed to compile regex grammar: bad")
        if text == "broken":
            raise IndexError("an error in this server")
        return text

    def close(self) -> None:
        pass


class Checker:
    """No process; remembers that it was ended."""

    def __init__(self) -> None:
        self.ended = threading.Event()

    def end(self) -> None:
        self.ended.set()

    def close(self) -> None:
        pass


def scripted(workers: int = 1) -> tuple[GrammarPool, ScriptedCompiler]:
    compiler = ScriptedCompiler()
    return GrammarPool(compiler, workers, Checker), compiler  # type: ignore[arg-type]


def decided(pool: GrammarPool, count: int) -> dict[str, Any]:
    """The next `count` outcomes, in order."""
    found: dict[str, Any] = {}
    until = time.monotonic() + 120
    while len(found) < count and time.monotonic() < until:
        found |= dict(pool.ready())
        time.sleep(0.001)
    assert len(found) == count, found
    return found


def test_the_pool_gives_back_each_request_once_with_its_grammar_or_its_refusal() -> None:
    pool, compiler = scripted()
    pool.submit("r1", "regex", "good")
    pool.submit("r2", "regex", "bad")
    assert pool.ready() == [] and pool.pending == 2
    compiler.go.set()
    found = decided(pool, 2)
    assert found["r1"] == "good" and isinstance(found["r2"], RequestError)
    assert pool.ready() == [] and pool.pending == 0
    pool.close()


def test_what_was_compiled_before_is_ready_at_once_whatever_else_is_being_compiled() -> None:
    pool, compiler = scripted()
    compiler.cache = {"seen": "seen", "bad": RequestError("Failed to compile regex grammar: bad")}
    for text in ("new", "seen", "bad"):
        pool.submit(text, "regex", text)
    found = dict(pool.ready())
    assert found["seen"] == "seen" and isinstance(found["bad"], RequestError) and len(found) == 2
    assert pool.pending == 1
    compiler.go.set()
    assert decided(pool, 1) == {"new": "new"} and [text for text, _ in compiler.tries] == ["new"]
    pool.close()


def test_a_known_grammar_is_not_given_to_a_request_that_was_cancelled() -> None:
    pool, compiler = scripted()
    compiler.cache = {"seen": "seen"}
    pool.submit("r1", "regex", "seen")
    pool.cancel("r1")
    assert pool.ready() == [] and pool.pending == 0
    pool.close()


def test_an_error_in_the_compiler_ends_one_request_and_not_the_service() -> None:
    pool, compiler = scripted()
    compiler.go.set()
    pool.submit("r1", "regex", "broken")
    pool.submit("r2", "regex", "good")
    found = decided(pool, 2)
    assert found["r1"].kind.status == 500 and found["r2"] == "good"
    pool.close()


def test_a_cancelled_request_never_comes_back_and_its_work_is_ended() -> None:
    pool, compiler = scripted()
    pool.submit("running", "regex", "a")
    assert compiler.begun.wait(120)
    pool.submit("waiting", "regex", "b")
    pool.submit("kept", "regex", "c")
    pool.cancel("waiting")
    assert not pool._checkers[0].ended.is_set()  # type: ignore[attr-defined]
    pool.cancel("running")
    pool.cancel("unknown")
    assert pool._checkers[0].ended.is_set()  # type: ignore[attr-defined]
    compiler.go.set()
    assert decided(pool, 1) == {"kept": "c"}
    assert [text for text, _ in compiler.tries] == ["a", "c"]
    pool.close()


def test_long_tries_wait_until_first_tries_are_over() -> None:
    pool, compiler = scripted()
    pool.submit("r1", "regex", "slow")
    pool.submit("r2", "regex", "quick")
    compiler.go.set()
    decided(pool, 2)
    assert compiler.tries == [("slow", False), ("quick", False), ("slow", True)]
    pool.close()


def queued(queue: FairQueue, prefer_long: bool = False) -> list[str]:
    found = []
    while (job := queue.take(prefer_long)) is not None:
        found.append(job.rid)
    return found


def test_the_grammars_of_different_calls_alternate_however_many_each_has() -> None:
    queue = FairQueue()
    for number in range(4):
        queue.put(Job(f"many-{number}", "regex", "", call="many"))
    queue.put(Job("one", "regex", "", call="one"))
    queue.put(Job("two", "regex", "", call="two"))
    assert queued(queue) == ["many-0", "one", "two", "many-1", "many-2", "many-3"]


def test_a_worker_takes_jobs_of_its_preferred_group_first_and_then_the_others() -> None:
    queue = FairQueue()
    queue.put(Job("first", "regex", "", call="a"))
    queue.put(Job("second", "regex", "", call="a", long=True))
    assert queued(queue, prefer_long=True) == ["second", "first"]


def test_a_quick_grammar_waits_for_one_first_try_of_a_call_with_a_thousand_slow_ones() -> None:
    pool, compiler = scripted()
    pool.submit("h0", "regex", "slow 0", call="slow")
    assert compiler.begun.wait(120)
    for number in range(1, 1000):
        pool.submit(f"h{number}", "regex", f"slow {number}", call="slow")
    pool.submit("quick", "regex", "good", call="quick")
    compiler.go.set()
    decided(pool, 1001)
    assert compiler.tries.index(("good", False)) <= 2
    pool.close()


# with the real compiler


@pytest.fixture(scope="module")
def compiler() -> Any:
    compiler = GrammarCompiler(DEMO, 4096, [0])
    yield compiler
    compiler.close()


def test_a_text_that_is_costly_to_read_is_read_in_the_checking_process(
    compiler: GrammarCompiler, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading it here once took seconds, so here nothing may read it."""

    def read_here(*arguments: Any, **options: Any) -> None:
        raise AssertionError("the text is read in this process")

    compiler.compile("regex", "ab*")  # the tokenizer is loaded
    monkeypatch.setattr(grammar_check, "source", read_here)
    monkeypatch.setattr(matchers, "LLMatcher", read_here)
    with pytest.raises(RequestError, match=re.escape("Failed to compile ebnf grammar: line 1: unexpected '{1")):
        compiler.compile("ebnf", BLANKS)


def test_aborting_a_request_kills_the_process_that_checks_its_grammar(compiler: GrammarCompiler) -> None:
    gone: list[BaseException] = []
    begun = threading.Event()

    class Watched(Guarded):
        def run(self, order: bytes, cpu_s: float) -> bytes:
            begun.set()
            try:
                return super().run(b"loop", 60.0)
            except Gone as error:
                gone.append(error)
                raise

    pool = GrammarPool(compiler, workers=1, new_checker=lambda: Watched("tests.stand_ins.guarded_work"))
    pool.submit("r", "regex", "never seen before")
    assert begun.wait(120)
    while pool._checkers[0].pid is None:
        time.sleep(0.001)
    pool.cancel("r")
    pool.close()
    assert len(gone) == 1 and pool.ready() == []


def test_the_pool_compiles_with_the_real_compiler(compiler: GrammarCompiler) -> None:
    pool = GrammarPool(compiler)
    pool.warm()
    pool.submit("r", "json_schema", '{"type": "integer"}')
    pool.submit("bad", "ebnf", BLANKS)
    found = decided(pool, 2)
    assert found["r"].matcher() is not None
    assert "line 1: unexpected '{1" in str(found["bad"])
    pool.close()


@pytest.mark.parametrize("kind", ["ebnf", "regex"])
def test_reading_a_grammar_costs_in_proportion_to_its_length(kind: str) -> None:
    """CPU time over doublings; quadratic reading would quadruple."""
    texts = {"ebnf": lambda n: 'root ::= "a"{1' + " " * n + "x", "regex": lambda n: "[" * n}
    read = {"ebnf": from_ebnf, "regex": from_regex}[kind]
    costs = []
    for size in (1 << 14, 1 << 15, 1 << 16, limits.MAX_GRAMMAR_BYTES):
        before = time.thread_time()
        for _ in range(3):
            with pytest.raises(ValueError, match=r"unexpected|not closed"):
                read(texts[kind](size))
        costs.append(time.thread_time() - before)
    assert costs[-1] < 40 * max(costs[0], 1e-3), costs
