"""What a model gives for a text where that is no single vector: one for each token (ColBERT), or weights of words.

Read from the files of sentence-transformers, PyLate and Stanford's ColBERT.
"""

import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import msgspec

from quartet.runtime.errors import StartupError
from quartet.runtime.limits import MAX_FILLED_TOKENS
from quartet.runtime.model_files.files import MAX_SETTINGS_BYTES, present, read_small
from quartet.runtime.shorten import short

Json = Mapping[str, Any]

COLBERT = "HF_ColBERT"  # the architecture of Stanford's checkpoints
COLBERT_SETTINGS = "artifact.metadata"
COLBERT_SIZE = 128  # of a vector, where the settings do not say
QUERY_TOKENS = 32  # that queries are filled up to, likewise
MAX_SKIPPED_WORDS = 4096
MODEL_TYPES = ("ColBERT", "MultiVectorEncoder")  # in config_sentence_transformers.json
PYLATE_MARKS = ("query_prefix", "document_prefix", "do_query_expansion", "query_length", "attend_to_expansion_tokens")


class Sparse(msgspec.Struct, frozen=True, kw_only=True):
    """How the weights of words are made of a language model's logits."""

    pooling_strategy: Literal["max", "sum"] = "max"
    activation_function: Literal["relu", "log1p_relu"] = "relu"  # behind it stands log(1 + x)


class Expansion(msgspec.Struct, frozen=True, kw_only=True):
    """Tokens that fill queries up; their vectors count."""

    length: int
    strategy: Literal["fixed", "min"] = "fixed"  # longer queries are cut, or stay
    attend: bool = False  # whether other tokens see them, and they each other
    token: str | None = None  # None: the tokenizer's mask


class MultiVector(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens' vectors of queries and documents differ."""

    marks: tuple[str, ...] = ()  # prompts that begin with a token of their own
    skipped_words: tuple[str, ...] = ()  # tokens whose vectors are left out
    skips: tuple[str, ...] = ("document",)  # where they are
    expansion: Expansion | None = None  # of queries


def read_sparse(file: Path) -> Sparse:
    """The settings of a SpladePooling module. Raises StartupError."""
    found: Sparse = settings(file, Sparse, "a sparse pooling that is served")
    return found


def stanford(path: Path) -> tuple[MultiVector, dict[str, str], int]:
    """What Stanford's ColBERT says of itself: how it treats tokens, its prompts, numbers of a vector."""
    file = path / COLBERT_SETTINGS
    given = settings(file, dict[str, Any], "a ColBERT") if present(file) else {}
    marks = {"query": given.get("query_token_id") or "[unused0]", "document": given.get("doc_token_id") or "[unused1]"}
    found = MultiVector(
        marks=tuple(f"{mark} " for mark in marks.values()),
        skipped_words=tuple(string.punctuation) if given.get("mask_punctuation", True) else (),
        expansion=expansion(file, {"length": given.get("query_maxlen") or QUERY_TOKENS}, given),
    )
    size = given.get("dim", COLBERT_SIZE)
    if type(size) is not int or not 1 <= size <= 1 << 16:
        raise StartupError(f"{file}: dim is {short(repr(size))}; it must be an integer from 1 to {1 << 16}")
    return found, {name: f"{mark} " for name, mark in marks.items()}, size


def expansion(file: Path, given: Json, attends: Json) -> Expansion:
    """Checked settings of a query's expansion. Raises StartupError."""
    attend = attends.get("attend_to_expansion_tokens", attends.get("attend_to_mask_tokens"))
    try:
        found = msgspec.convert({"attend": bool(attend), **given}, Expansion)
    except msgspec.ValidationError as error:
        raise StartupError(f"{file} does not describe how queries are filled up: {error}") from error
    if not 1 <= found.length <= MAX_FILLED_TOKENS:
        raise StartupError(
            f"{file}: queries are filled up to {found.length} tokens; served are 1 to {MAX_FILLED_TOKENS}"
        )
    return found


def pylate(file: Path, given: Json) -> tuple[MultiVector, dict[str, str]]:
    """How a PyLate model treats tokens, and the marks before its prompts; `given`: its settings, from `file`."""
    marks = {name: given.get(f"{name}_prefix") for name in ("query", "document")}
    if wrong := next((name for name, mark in marks.items() if not isinstance(mark, str | None)), None):
        raise StartupError(f"{file}: {wrong}_prefix must be a text")
    words = given.get("skiplist_words")
    fills = given.get("do_query_expansion") is not False and any(name in given for name in PYLATE_MARKS)
    found = MultiVector(
        marks=tuple(mark for mark in marks.values() if mark),
        skipped_words=checked_words(file, list(string.punctuation) if words is None else words),
        expansion=expansion(file, {"length": given.get("query_length") or QUERY_TOKENS}, given) if fills else None,
    )
    return found, {name: mark for name, mark in marks.items() if mark}


def masked(file: Path, found: MultiVector) -> MultiVector:
    """With the settings of a MultiVectorMask module. Raises StartupError for images alone."""
    given = settings(file, dict[str, Any], "a mask of vectors")
    if given.get("keep_only_token_ids"):
        raise StartupError(f"{file} keeps the vectors of some tokens alone (keep_only_token_ids), which is not served")
    tasks = given.get("skiplist_tasks") or ["document"]
    return msgspec.structs.replace(
        found,
        skipped_words=checked_words(file, given.get("skiplist_words") or []),
        skips=tuple(task for task in ("query", "document") if task in tasks),
    )


def expanded(file: Path, found: MultiVector) -> MultiVector:
    """With what sentence_bert_config.json says of queries."""
    given = settings(file, dict[str, Any], "a model").get("query_expansion") if present(file) else None
    return found if given is None else msgspec.structs.replace(found, expansion=expansion(file, dict(given), {}))


def checked_words(file: Path, words: Any) -> tuple[str, ...]:
    """The words of a list. Raises StartupError."""
    if not isinstance(words, list) or len(words) > MAX_SKIPPED_WORDS or not all(isinstance(w, str) for w in words):
        raise StartupError(f"{file}: skiplist_words must be a list of at most {MAX_SKIPPED_WORDS} texts")
    return tuple(words)


def settings(file: Path, kind: Any, name: str) -> Any:
    """A settings file as `kind`. Raises StartupError."""
    try:
        return msgspec.json.decode(read_small(file, MAX_SETTINGS_BYTES), type=kind)
    except (StartupError, msgspec.DecodeError) as error:
        raise StartupError(f"{file} does not describe {name}: {error}") from error
