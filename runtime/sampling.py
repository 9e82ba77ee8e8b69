"""Sampling parameters: the native names, their defaults, and what is valid.

A new parameter is one field here and the place that uses it; it rides inside every message unopened.
"""

import json
from collections.abc import Callable
from math import isfinite
from typing import Any

import msgspec

from quartet.runtime import limits
from quartet.runtime.errors import RequestError

MOST_BIAS = 3.4028234663852886e38  # the largest number of float32, in which logits are
GREEDY_BELOW = 1e-6  # temperatures under this are greedy
ID_DIGITS = 10  # of a token id; what is longer is none, and need not be read


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True, forbid_unknown_fields=True):
    """How to draw the output tokens of one request (api names, api defaults)."""

    max_new_tokens: int | None = 128  # None: until the context is full
    min_new_tokens: int = 0
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1  # -1: the whole vocabulary
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stop_regex: str | list[str] | None = None
    ignore_eos: bool = False  # also disables stop_token_ids
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    no_stop_trim: bool = False
    n: int = 1
    json_schema: str | None = None
    regex: str | None = None
    ebnf: str | None = None
    structural_tag: str | None = None
    call_grammar: str | None = None  # of tool calls, by the gateway: a runtime.call_grammar.CallGrammar in JSON
    logit_bias: dict[str, float] | None = None
    sampling_seed: int | None = None
    stream_interval: int | None = None
    thinking_budget: int | None = None  # tokens of the thought, without its tags; then the closing tag is forced
    custom_params: dict[str, Any] | None = None

    @property
    def greedy(self) -> bool:
        return self.temperature < GREEDY_BELOW or self.top_k == 1

    @property
    def stop_strings(self) -> list[str]:
        return as_list(self.stop)

    @property
    def stop_patterns(self) -> list[str]:
        return as_list(self.stop_regex)

    @property
    def grammar(self) -> tuple[str, str] | None:
        """(kind, text) of the one grammar that constrains the output, if any."""
        for kind in GRAMMARS:
            if (text := getattr(self, kind)) is not None:
                return kind, text
        return None


GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag", "call_grammar")
WRITTEN_IN_JSON = {"json_schema", "structural_tag"}


def read_params(given: dict[str, Any], vocab_size: int | None = None) -> SamplingParams:
    """Parameters by name; a grammar written in JSON may be its text or the object itself.

    With a vocabulary, stop ids that are null or outside it are left out: clients send both, and the model never writes
    them. Raises RequestError or msgspec.ValidationError; see `check_params` for the values' ranges.
    """
    objects = {name: given[name] for name in WRITTEN_IN_JSON if isinstance(given.get(name), dict)}
    read = given | {name: as_json(name, value) for name, value in objects.items()}
    if vocab_size is not None and isinstance(ids := read.get("stop_token_ids"), list):
        read["stop_token_ids"] = [
            token for token in ids if token is not None and (type(token) is not int or 0 <= token < vocab_size)
        ]
    return msgspec.convert(read, SamplingParams)


def as_json(name: str, value: dict[str, Any]) -> str:
    """The text of an object. Raises RequestError, naming the field, where it is deeper than can be written."""
    try:
        return json.dumps(value)
    except RecursionError:
        raise RequestError(f"{name} is nested too deeply.", field=name) from None


def as_list(value: str | list[str] | None) -> list[str]:
    if value is None:
        return []
    return [value] if isinstance(value, str) else value


Check = tuple[str, Callable[[SamplingParams], bool], Callable[[SamplingParams], str]]

# (field, holds, message): the first that does not hold is the answer's 400.
CHECKS: list[Check] = [
    (
        "temperature",
        lambda p: isfinite(p.temperature) and p.temperature >= 0,
        lambda p: f"temperature must be a non-negative finite number, got {p.temperature}.",
    ),
    ("top_p", lambda p: 0 < p.top_p <= 1, lambda p: f"top_p must be in (0, 1], got {p.top_p}."),
    ("min_p", lambda p: 0 <= p.min_p <= 1, lambda p: f"min_p must be in [0, 1], got {p.min_p}."),
    (
        "top_k",
        lambda p: p.top_k == -1 or p.top_k >= 1,
        lambda p: f"top_k must be -1 (disable) or at least 1, got {p.top_k}.",
    ),
    (
        "frequency_penalty",
        lambda p: -2 <= p.frequency_penalty <= 2,
        lambda p: f"frequency_penalty must be in [-2, 2], got {p.frequency_penalty}.",
    ),
    (
        "presence_penalty",
        lambda p: -2 <= p.presence_penalty <= 2,
        lambda p: f"presence_penalty must be in [-2, 2], got {p.presence_penalty}.",
    ),
    (
        "repetition_penalty",
        lambda p: 0 < p.repetition_penalty <= 2,
        lambda p: f"repetition_penalty must be in (0, 2] (1.0 = no penalty), got {p.repetition_penalty}.",
    ),
    (
        "max_new_tokens",
        lambda p: p.max_new_tokens is None or p.max_new_tokens >= 0,
        lambda p: f"max_new_tokens must be at least 0, got {p.max_new_tokens}.",
    ),
    (
        "max_new_tokens",
        lambda p: p.max_new_tokens is None or p.max_new_tokens <= limits.MAX_NEW_TOKENS,
        lambda p: f"max_new_tokens must be at most {limits.MAX_NEW_TOKENS}, got {p.max_new_tokens}.",
    ),
    (
        "min_new_tokens",
        lambda p: p.min_new_tokens >= 0,
        lambda p: f"min_new_tokens must be in [0, max_new_tokens], got {p.min_new_tokens}.",
    ),
    (
        "min_new_tokens",
        lambda p: p.max_new_tokens is None or p.min_new_tokens <= p.max_new_tokens,
        lambda p: f"min_new_tokens must be in [0, max_new_tokens({p.max_new_tokens})], got {p.min_new_tokens}.",
    ),
    ("n", lambda p: 1 <= p.n <= limits.MAX_N, lambda p: f"n must be in [1, {limits.MAX_N}], got {p.n}."),
    (
        "stream_interval",
        lambda p: p.stream_interval is None or p.stream_interval >= 1,
        lambda p: f"stream_interval must be at least 1, got {p.stream_interval}.",
    ),
    (
        "thinking_budget",
        lambda p: p.thinking_budget is None or 0 <= p.thinking_budget <= limits.MAX_NEW_TOKENS,
        lambda p: f"thinking_budget must be in [0, {limits.MAX_NEW_TOKENS}], got {p.thinking_budget}.",
    ),
    (
        "sampling_seed",
        lambda p: p.sampling_seed is None or -(2**63) <= p.sampling_seed < 2**63,
        lambda p: f"sampling_seed must be in [-2**63, 2**63 - 1], got {p.sampling_seed}.",
    ),
    (
        "stop",
        lambda p: len(p.stop_strings) <= limits.MAX_STOP_STRINGS,
        lambda p: f"stop takes at most {limits.MAX_STOP_STRINGS} strings, got {len(p.stop_strings)}.",
    ),
    (
        "stop",
        lambda p: all(0 < len(s.encode()) <= limits.MAX_STOP_STRING_BYTES for s in p.stop_strings),
        lambda p: f"each stop string must have 1 to {limits.MAX_STOP_STRING_BYTES} bytes.",
    ),
    (
        "stop_regex",
        lambda p: len(p.stop_patterns) <= limits.MAX_STOP_STRINGS,
        lambda p: f"stop_regex takes at most {limits.MAX_STOP_STRINGS} patterns, got {len(p.stop_patterns)}.",
    ),
    (
        "stop_regex",
        lambda p: all(0 < len(s.encode()) <= limits.MAX_STOP_REGEX_BYTES for s in p.stop_patterns),
        lambda p: f"each stop_regex must have 1 to {limits.MAX_STOP_REGEX_BYTES} bytes.",
    ),
    (
        "stop_token_ids",
        lambda p: len(p.stop_token_ids or ()) <= limits.MAX_STOP_TOKEN_IDS,
        lambda p: f"stop_token_ids takes at most {limits.MAX_STOP_TOKEN_IDS} ids.",
    ),
    (
        "logit_bias",
        lambda p: len(p.logit_bias or ()) <= limits.MAX_LOGIT_BIAS,
        lambda p: f"logit_bias takes at most {limits.MAX_LOGIT_BIAS} entries.",
    ),
    (
        "logit_bias",
        lambda p: all(abs(bias) <= MOST_BIAS for bias in (p.logit_bias or {}).values()),
        lambda p: f"logit_bias must have values in [-{MOST_BIAS}, {MOST_BIAS}].",
    ),
    (
        "grammar",
        lambda p: sum(getattr(p, kind) is not None for kind in GRAMMARS) <= 1,
        lambda p: "Only one of json_schema, regex, ebnf, or structural_tag can be set.",
    ),
    (
        "grammar",
        lambda p: p.grammar is None or len(p.grammar[1].encode()) <= limits.MAX_GRAMMAR_BYTES,
        lambda p: f"a grammar may have at most {limits.MAX_GRAMMAR_BYTES} bytes.",
    ),
]


def check_params(params: SamplingParams, vocab_size: int) -> None:
    """Raise RequestError (400, naming the field) for the first invalid parameter."""
    for field, holds, message in CHECKS:
        if not holds(params):
            raise RequestError(message(params), field=field)
    for key in params.logit_bias or ():
        if not (key.isascii() and key.isdigit() and len(key) <= ID_DIGITS and int(key) < vocab_size):
            raise RequestError(f"logit_bias must has keys in [0, {vocab_size - 1}], got {key}.", field="logit_bias")
