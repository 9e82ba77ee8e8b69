"""Constrained output: compiled grammars, and the matchers that mask the logits.

    GrammarCompiler.compile(kind, text) ──► checked in another process, then compiled ──► Grammar
    Grammar.matcher(output ids) ──► Matcher: mask a row, accept a token, finished
    Grammar.guide() ──► Guide: which drafts it allows, which tokens it forces

A matcher is a function of the grammar and the output ids, so a retracted or replayed request rebuilds its own.
"""

import hashlib
import threading
from array import array
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import msgspec
import numpy as np
from llguidance import LLExecutor, LLMatcher, LLParserLimits, LLTokenizer
from numpy.typing import NDArray

from quartet.runtime import limits
from quartet.runtime.errors import Kind, RequestError
from quartet.runtime.process.guarded import Crashed, Gone, Guarded, OutOfTime
from quartet.runtime.process.memory import give_back
from quartet.scheduler_service.grammar import check as grammar_check
from quartet.scheduler_service.grammar.check import CheckRequest, CheckResult
from quartet.scheduler_service.grammar.source import needs_tokens

Bitmask = NDArray[np.int32]  # (rows, ceil(vocab / 32)); bit i of a row is set where token i is allowed

PARALLEL_FROM = 64  # rows; one usually takes microseconds, and starting other threads a hundred

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
        """The grammar allows nothing more: the request ends, with or without an end token."""
        return bool(self.engine.is_stopped())

    @property
    def accepting(self) -> bool:
        """What was generated so far is complete."""
        return bool(self.engine.is_accepting())

    @property
    def failed(self) -> bool:
        """Whether it cannot go on: see `error`."""
        return bool(self.engine.is_error())

    @property
    def error(self) -> str:
        """Why this matcher cannot go on (a step too costly, a token not allowed), or empty."""
        return str(self.engine.get_error()).partition("\n")[0]

    def accept(self, token: int) -> bool:
        """Take a sampled token; False when the grammar does not allow it."""
        return bool(self.engine.consume_token(token))

    def forced(self) -> list[int]:
        """The tokens of the only text that the grammar allows next; often none. The time is that of the whole text.

        The first is the only one that the mask allows. Those behind it may be others once it was taken.
        """
        return self.engine.compute_ff_tokens()


class Guide:
    """What a grammar says of the next tokens: see quartet.scheduler_service.core.drafts.Guide.

    It has an engine of its own, so that drafts can be proposed while a step still uses that of the matcher. Where its
    engine fails, it allows and forces nothing.
    """

    def __init__(self, engine: LLMatcher) -> None:
        self._engine = engine

    def take(self, tokens: "array[int]") -> None:
        """Tokens that the output has grown by."""
        self._engine.consume_tokens(tokens.tolist())

    def allowed(self, draft: Sequence[int]) -> int:
        """How many tokens of a draft, from its first one on, the grammar allows next."""
        return 0 if self._engine.is_error() else int(self._engine.validate_tokens(list(draft)))

    def forced(self) -> tuple[int, ...]:
        """The tokens of the only text that the grammar allows next; often none."""
        return () if self._engine.is_error() else tuple(self._engine.compute_ff_tokens())


class Grammar:
    """A compiled grammar; its matchers are cheap copies."""

    def __init__(self, prototype: LLMatcher) -> None:
        self._prototype = prototype

    def matcher(self, output_ids: Sequence[int] = ()) -> Matcher:
        """A matcher that has accepted these output ids. Raises RequestError when the grammar does not allow them."""
        engine = self._prototype.deep_copy()
        if output_ids and not engine.consume_tokens(list(output_ids)):
            raise RequestError("the tokens generated so far do not follow the grammar", Kind.INTERNAL)
        return Matcher(engine)

    def guide(self) -> Guide:
        """A guide at the beginning of the output."""
        return Guide(self._prototype.deep_copy())


class Constrained(NamedTuple):
    """The rows of a bitmask that one request needs."""

    matcher: Matcher
    row: int  # of its next token
    drafts: tuple[int, ...] = ()  # each has a row behind it, as if it had been accepted


class MaskFiller:
    """Fills the rows of a bitmask; many rows on a few threads, where there are several."""

    def __init__(self, threads: int) -> None:
        self._executor = LLExecutor(num_threads=threads) if threads > 1 else None

    def uses_threads(self, requests: int) -> bool:
        """Whether it takes threads of its own for so many."""
        return self._executor is not None and requests >= PARALLEL_FROM

    def fill(self, constrained: Sequence[Constrained], bitmask: Bitmask, address: int = 0) -> None:
        """Write the masks of each request to its rows; the other rows stay as they are. See Matcher.error afterwards.

        So do rows behind a draft that is not allowed, or that completes the output. No matcher moves on.
        `address`: of the bitmask, where the caller knows it.
        """
        count, words = bitmask.shape
        assert bitmask.flags.c_contiguous, bitmask.shape
        address, row_bytes = address or bitmask.ctypes.data, words * 4
        for _, row, drafts in constrained:
            assert 0 <= row < count - len(drafts), (row, drafts, bitmask.shape)
        if self.uses_threads(len(constrained)):
            self._fill_in_parallel(constrained, address, row_bytes, count)
            return
        for matcher, row, drafts in constrained:
            engine, own = matcher.engine, address + row * row_bytes
            if drafts:
                engine.unsafe_compute_mask_ptr_with_draft_token(own, row_bytes, list(drafts))  # type: ignore[attr-defined]
            else:
                engine.unsafe_compute_mask_ptr(own, row_bytes)

    def _fill_in_parallel(self, constrained: Sequence[Constrained], address: int, row_bytes: int, count: int) -> None:
        """The same on the executor's threads, which take requests with and without drafts in two calls."""
        assert self._executor is not None
        drafted = [(matcher.engine, row, list(drafts)) for matcher, row, drafts in constrained if drafts]
        others = [(matcher.engine, row) for matcher, row, drafts in constrained if not drafts]
        if others:
            self._executor.unsafe_compute_mask_ptr(others, address, row_bytes, count)
        if drafted:
            self._executor.unsafe_compute_mask_ptr_with_draft_token(drafted, address, row_bytes, count)


def bitmask_words(vocab_size: int) -> int:
    return -(-vocab_size // 32)


class AddedToken(msgspec.Struct):
    content: str
    id: int


class AddedTokens(msgspec.Struct):
    """What is read here of a tokenizer.json: of all that it has, the vocabulary and its merges would take 100 MB."""

    added_tokens: list[AddedToken] | None = None


class NeedsLongTry(Exception):
    """A grammar was not checked in its first, short try."""


Outcome = Grammar | RequestError | NeedsLongTry


class GrammarCompiler:
    """Compiles grammars for one tokenizer, which is loaded at the first use; safe to call from several threads."""

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
        self._checker = new_checker()
        self._cache: OrderedDict[bytes, Outcome] = OrderedDict()
        self._cache_lock = threading.Lock()
        self._load_lock = threading.Lock()
        self.hits = 0
        self.misses = 0

    def compile(self, kind: str, text: str) -> Grammar:
        """The grammar, from the cache if it was compiled before. Raises RequestError (400)."""
        try:
            return self.try_compile(kind, text, self._checker)
        except NeedsLongTry:
            return self.try_compile(kind, text, self._checker, long=True)

    def try_compile(self, kind: str, text: str, checker: Guarded, *, long: bool = False) -> Grammar:
        """The same with the caller's checking process, and with a short time limit unless `long`.

        Raises RequestError, or NeedsLongTry where the short time limit was exceeded.
        """
        key = cache_key(kind, text)
        with self._cache_lock:
            found = self._cache.get(key)
            if isinstance(found, NeedsLongTry) and long:
                found = None
            elif found is not None:
                self.hits += 1
                self._cache.move_to_end(key)
            else:
                self.misses += 1
        if found is None:
            found = self._outcome(kind, text, checker, long)
            self._store(key, found)
        if isinstance(found, RequestError):
            raise repeated(found)
        if isinstance(found, NeedsLongTry):
            raise NeedsLongTry
        return found

    def known(self, kind: str, text: str) -> Grammar | RequestError | None:
        """The grammar that the cache has, or its refusal; None where it must be compiled. Never waits for that."""
        key = cache_key(kind, text)
        with self._cache_lock:
            found = self._cache.get(key)
            if found is None or isinstance(found, NeedsLongTry):
                return None
            self.hits += 1
            self._cache.move_to_end(key)
        return repeated(found) if isinstance(found, RequestError) else found

    def _store(self, key: bytes, outcome: Outcome) -> None:
        with self._cache_lock:
            self._cache[key] = outcome
            self._cache.move_to_end(key)
            while len(self._cache) > self._cache_entries:
                self._cache.popitem(last=False)

    def _outcome(self, kind: str, text: str, checker: Guarded, long: bool) -> Outcome:
        """The grammar or its refusal: a refusal is cached too, and costs nothing the second time."""
        cpu_s = limits.grammar_cpu_s(len(text.encode())) if long else limits.GRAMMAR_FIRST_CPU_S
        try:
            tokenizer = self._load()
            grammar = self._checked(kind, text, checker, cpu_s)
            engine = LLMatcher(tokenizer, grammar, log_level=0, limits=LIMITS)
            engine.compute_bitmask()  # some grammars fail only here, and the first step needs these states
            if engine.is_error():
                raise ValueError(engine.get_error())
            if engine.is_stopped() and not engine.is_accepting():
                raise ValueError("it allows no output at all")
        except OutOfTime:
            if not long:
                return NeedsLongTry()
            return refused(kind, f"it takes more than {cpu_s * 1000:.0f} ms to compile")
        except Crashed:
            return refused(kind, "it takes too much memory to compile")
        except (ValueError, RecursionError) as error:
            return refused(kind, grammar_check.shortened(str(error)))
        return Grammar(engine)

    def _load(self) -> LLTokenizer:
        with self._load_lock:
            if self._tokenizer is None:
                if not self._path.is_file():
                    raise ValueError("this model has no tokenizer.json, so output cannot be constrained")
                data = self._path.read_text(encoding="utf-8")
                self._tokenizer = LLTokenizer(data, n_vocab=self._vocab_size, eos_token=self._eos_ids or None)
                added = msgspec.json.decode(data, type=AddedTokens, strict=False).added_tokens or []
                self._special_tokens = {
                    token.content: token.id for token in added if self._tokenizer.is_special_token(token.id)
                }
                del data
                give_back()  # of what was parsed
            return self._tokenizer

    def _checked(self, kind: str, text: str, checker: Guarded, cpu_s: float) -> str:
        """The grammar as the engine takes it, read and tried in the checking process.

        Raises ValueError, OutOfTime or Crashed; and RequestError, which is not cached, when that process is ended
        before it has answered.
        """
        special_tokens = self._special_tokens if needs_tokens(kind, text) else {}
        request = msgspec.msgpack.encode(CheckRequest(kind, text, special_tokens))
        try:
            result = msgspec.msgpack.decode(checker.run(request, cpu_s), type=CheckResult)
        except Gone as error:
            raise RequestError("The process that checks grammars has ended; try again.", Kind.UNAVAILABLE) from error
        if result.problem:
            raise ValueError(result.problem)
        return result.grammar

    def close(self) -> None:
        """End the checking process."""
        self._checker.close()


def cache_key(kind: str, text: str) -> bytes:
    return hashlib.sha256(f"{kind} {text}".encode()).digest()


def repeated(refusal: RequestError) -> RequestError:
    """The same refusal for another request: one that is raised again and again would keep all their tracebacks."""
    return RequestError(refusal.message, refusal.kind, refusal.field)


def new_checker() -> Guarded:
    """A process that checks grammars; started with the first one."""
    return Guarded(grammar_check.MODULE)


def refused(kind: str, reason: str) -> RequestError:
    return RequestError(f"Failed to compile {kind} grammar: {reason}", field=kind)
