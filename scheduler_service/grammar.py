"""Constrained output: grammars compiled beside the scheduler's loop, and the matchers that mask its logits.

    GrammarPool.submit(rid, kind, text) ──► worker thread: source → check → compile ──► GrammarPool.ready()
    Grammar.matcher(output ids) ──► Matcher: mask a row, accept a token, finished

A matcher is a function of the grammar and the output ids, so a retracted or replayed request rebuilds its own.
"""

import json
import logging
import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from runtime import limits
from runtime.errors import Kind, RequestError
from scheduler_service import grammar_check
from scheduler_service.grammar_check import read_frame, write_frame
from scheduler_service.grammar_source import source

log = logging.getLogger(__name__)

Bitmask = NDArray[np.int32]  # (rows, ceil(vocab / 32)); bit i of a row is set where token i is allowed

PARALLEL_FROM = 64  # rows; one takes microseconds as a rule, handing them to other threads takes a hundred

LIMITS = LLParserLimits(
    max_items_in_row=2_000,
    initial_lexer_fuel=1_000_000,
    step_lexer_fuel=200_000,
    step_max_items=200_000,
    max_lexer_states=50_000,
    max_grammar_size=100_000,
    verbose_errors=False,
)


class Matcher:
    """How far one request has come in its grammar."""

    def __init__(self, engine: LLMatcher) -> None:
        self.engine = engine

    @property
    def finished(self) -> bool:
        """The grammar allows nothing more: the request ends here, with or without an end token."""
        return bool(self.engine.is_stopped())

    @property
    def accepting(self) -> bool:
        """What was generated so far is complete."""
        return bool(self.engine.is_accepting())

    @property
    def error(self) -> str:
        """Why this matcher cannot go on (a step too costly, a token not allowed), or empty."""
        return str(self.engine.get_error()).partition("\n")[0]

    def accept(self, token: int) -> bool:
        """Take a sampled token; False when the grammar does not allow it."""
        return bool(self.engine.consume_token(token))


class Grammar:
    """A compiled grammar; its matchers are cheap copies."""

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype

    def matcher(self, output_ids: Sequence[int] = ()) -> Matcher:
        """A matcher behind these output ids. Raises RequestError when the grammar does not allow them."""
        engine = self._prototype.deep_copy()
        if output_ids and not engine.consume_tokens(list(output_ids)):
            raise RequestError("the tokens generated so far do not follow the grammar", Kind.INTERNAL)
        return Matcher(engine)


class MaskFiller:
    """Fills the rows of a bitmask; so many that it pays, on a few threads."""

    def __init__(self, threads: int) -> None:
        self._executor = LLExecutor(num_threads=threads)

    def fill(self, rows: Iterable[tuple[Matcher, int]], bitmask: Bitmask) -> None:
        """Write the mask of each matcher to its row; the other rows stay as they are. See Matcher.error afterwards."""
        pairs = [(matcher.engine, row) for matcher, row in rows]
        count, words = bitmask.shape
        assert bitmask.flags.c_contiguous and all(0 <= row < count for _, row in pairs), bitmask.shape
        address, row_bytes = bitmask.ctypes.data, words * 4
        if len(pairs) >= PARALLEL_FROM:
            self._executor.unsafe_compute_mask_ptr(pairs, address, row_bytes, count)
            return
        for engine, row in pairs:
            engine.unsafe_compute_mask_ptr(address + row * row_bytes, row_bytes)


def bitmask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


class GrammarCompiler:
    """Compiles grammars for one tokenizer. Everything is loaded at the first use; safe to call from one thread."""

    def __init__(
        self,
        tokenizer_path: Path,
        vocab_size: int,
        eos_ids: Sequence[int],
        cache_entries: int = limits.GRAMMAR_CACHE_ENTRIES,
    ) -> None:
        """`tokenizer_path`: the directory with tokenizer.json. `vocab_size`: the model's, padding included."""
        self._path = tokenizer_path / "tokenizer.json"
        self._vocab_size = vocab_size
        self._eos_ids = list(eos_ids)
        self._cache_entries = cache_entries
        self._tokenizer: LLTokenizer | None = None
        self._special_tokens: dict[str, int] = {}
        self._checker: subprocess.Popen[bytes] | None = None
        self._kept: OrderedDict[tuple[str, str], Grammar | RequestError] = OrderedDict()
        self.hits = 0
        self.misses = 0

    def compile(self, kind: str, text: str) -> Grammar:
        """The grammar, from the cache if it was met before. Raises RequestError (400)."""
        key = kind, text
        if key in self._kept:
            self.hits += 1
            self._kept.move_to_end(key)
        else:
            self.misses += 1
            self._kept[key] = self._compiled(kind, text)
            while len(self._kept) > self._cache_entries:
                self._kept.popitem(last=False)
        found = self._kept[key]
        if isinstance(found, RequestError):
            raise RequestError(found.message, found.kind, found.field)
        return found

    def warm(self) -> None:
        """Load what the first grammar would otherwise wait for; nothing happens for a model without tokenizer.json."""
        if self._path.is_file():
            self._load()
            self._check("start: /a/")

    def _compiled(self, kind: str, text: str) -> Grammar | RequestError:
        """The grammar or its refusal: a refused one is remembered too, and costs nothing the second time."""
        try:
            tokenizer = self._load()
            grammar = source(kind, text, self._special_tokens)
            if problem := self._check(grammar):
                raise ValueError(problem)
            engine = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
            engine.compute_bitmask()  # some grammars fail only here; the first step then finds its states made
            if engine.is_error():
                raise ValueError(engine.get_error())
            if engine.is_stopped() and not engine.is_accepting():
                raise ValueError("it allows no output at all")
        except (ValueError, RecursionError) as error:
            reason = str(error).replace("<non-verbose/>", "").strip()
            return RequestError(f"Failed to compile {kind} grammar: {reason}", field=kind)
        return Grammar(engine)

    def _load(self) -> LLTokenizer:
        if self._tokenizer is None:
            if not self._path.is_file():
                raise ValueError("this model has no tokenizer.json, so output cannot be constrained")
            data = self._path.read_text(encoding="utf-8")
            self._tokenizer = LLTokenizer(data, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)
            added = json.loads(data).get("added_tokens") or []
            self._special_tokens = {
                token["content"]: token["id"] for token in added if self._tokenizer.is_special_token(token["id"])
            }
        return self._tokenizer

    def _check(self, grammar: str) -> str:
        """The verdict of the checking process, which is started again if it has gone.

        Raises RequestError when it goes before it has answered: that says nothing of the grammar, and is not kept.
        """
        try:
            if self._checker is None or self._checker.poll() is not None:
                self._checker = self._start_checker()
            assert self._checker.stdin is not None and self._checker.stdout is not None
            write_frame(self._checker.stdin, grammar)
            verdict = read_frame(self._checker.stdout)
        except OSError:
            verdict = None
        if verdict is None:
            raise RequestError("The process that checks grammars has ended; try again.", Kind.UNAVAILABLE)
        return verdict

    def _start_checker(self) -> "subprocess.Popen[bytes]":
        budget = [str(limits.GRAMMAR_CPU_S), str(limits.GRAMMAR_MEMORY_BYTES)]
        command = [sys.executable, "-P", grammar_check.__file__, *budget]
        return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def close(self) -> None:
        """End the checking process."""
        if self._checker is not None:
            self._checker.communicate()
            self._checker = None


class GrammarPool:
    """Compiles in a thread while the scheduler's loop runs; the loop asks `ready` once a step."""

    def __init__(self, compiler: GrammarCompiler) -> None:
        self._compiler = compiler
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="grammar")
        self._waiting: dict[str, Future[Grammar]] = {}
        self._done: list[tuple[str, Future[Grammar]]] = []
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """Requests that wait for their grammar; the loop must not block for long while there are any."""
        return len(self._waiting)

    def warm(self) -> None:
        """Let the thread load what grammars need, ahead of the first one."""
        self._thread.submit(self._compiler.warm)

    def submit(self, rid: str, kind: str, text: str) -> None:
        """Start to compile a request's grammar."""
        future = self._thread.submit(self._compiler.compile, kind, text)
        self._waiting[rid] = future
        future.add_done_callback(lambda done: self._note(rid, done))

    def _note(self, rid: str, future: "Future[Grammar]") -> None:
        with self._lock:
            self._done.append((rid, future))

    def cancel(self, rid: str) -> None:
        """Forget a request that was aborted; unknown ones are ignored."""
        future = self._waiting.pop(rid, None)
        if future is not None:
            future.cancel()

    def ready(self) -> list[tuple[str, Grammar | RequestError]]:
        """The requests whose grammar was decided since the last call, each with it or with its refusal."""
        with self._lock:
            done, self._done = self._done, []
        mine = [(rid, future) for rid, future in done if self._waiting.get(rid) is future]
        return [(rid, _outcome(self._waiting.pop(rid))) for rid, _ in mine]

    def close(self) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)
        self._compiler.close()


def _outcome(future: "Future[Grammar]") -> Grammar | RequestError:
    error = future.exception()
    if error is None:
        return future.result()
    if isinstance(error, RequestError):
        return error
    log.error("a grammar could not be compiled, for a reason that is not its own", exc_info=error)
    return RequestError("The grammar could not be compiled.", Kind.INTERNAL)
