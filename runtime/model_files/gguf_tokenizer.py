"""The tokenizer in the metadata of a GGUF file, as a tokenizer.json and tokenizer_config.json.

Three kinds are served: `gpt2` (byte-level BPE, whose way of splitting text the file only names), `llama`
(SentencePiece BPE, whose merges follow from the scores of its pieces) and `gemma4` (the same with a list of merges).
"""

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from quartet.runtime.model_files.gguf import GgufError, Header
from quartet.runtime.model_files.gguf_config import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    UNUSED,
    USER_DEFINED,
    token_id,
)
from quartet.runtime.shorten import short

Json = dict[str, Any]

REMEDY = "name a directory with a tokenizer.json by --tokenizer-path"
TEMPLATE_KEY = re.compile(r"tokenizer\.chat_template(?:\.([A-Za-z0-9_-]{1,64}))?")
SPACE = "▁"  # how SentencePiece writes a space
MAX_PIECE_CHARS = 1 << 10  # the splits of a piece are tried one by one

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
REST_WITH_SLASH = r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
WORD_START = r"[^\r\n\p{L}\p{N}]?"
CASED = WORD_START + UPPER + "*" + LOWER + "+%s|" + WORD_START + UPPER + "+" + LOWER + "*%s"  # %s: what may follow


class Splitting(NamedTuple):
    """How text is cut into words before the merges of byte-level BPE."""

    regex: str | None = None  # None: GPT-2's own
    single_digits: bool = False  # digits are cut off one by one before that
    compose: bool = False  # Unicode is composed first (NFC)
    ignore_merges: bool = False  # a word that is a token is not merged up from bytes
    add_bos: bool = False  # where the file does not say


GPT2 = Splitting()
LLAMA3_REGEX = rf"{CONTRACTIONS}|{WORDS}|\p{{N}}{{1,3}}|{REST}"
LLAMA3 = Splitting(LLAMA3_REGEX, ignore_merges=True, add_bos=True)
QWEN2 = Splitting(rf"{CONTRACTIONS}|{WORDS}|\p{{N}}|{REST}", compose=True)
TEKKEN = Splitting(CASED % ("", "") + rf"|\p{{N}}|{REST_WITH_SLASH}", ignore_merges=True, add_bos=True)
GPT4O = Splitting(CASED % (CONTRACTIONS + "?", CONTRACTIONS + "?") + rf"|\p{{N}}{{1,3}}|{REST_WITH_SLASH}")
DIGITS = Splitting(single_digits=True)
SPLITTINGS: Mapping[str, Splitting] = {  # values of tokenizer.ggml.pre
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais"), GPT2),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "falcon3"), LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), Splitting(LLAMA3_REGEX)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "megrez", "stablelm2"), QWEN2),
    "tekken": TEKKEN,
    **dict.fromkeys(("gpt-4o", "llama4"), GPT4O),
    **dict.fromkeys(("starcoder", "refact", "command-r", "smollm", "codeshell", "exaone", "minerva-7b"), DIGITS),
}


class Vocabulary(NamedTuple):
    """The tokens of a file and the kind of each, by id."""

    tokens: list[str]
    kinds: list[int]

    def known(self) -> dict[str, int]:
        """Token → id, without those that only fill the matrix up. The first of two that are equal counts."""
        found: dict[str, int] = {}
        for id, (token, kind) in enumerate(zip(self.tokens, self.kinds, strict=True)):
            if kind != UNUSED or token != f"[PAD{id}]":
                found.setdefault(token, id)
        return found


def tokenizer_of(header: Header) -> Json:
    """The tokenizer.json. Raises GgufError where the file holds none that is served."""
    model = header.metadata.get("tokenizer.ggml.model")
    kinds = {"gpt2": byte_level, "llama": sentencepiece, "gemma4": sentencepiece}
    build = kinds.get(model if isinstance(model, str) else "")
    if build is None:
        raise GgufError(
            f"{header.file} holds a tokenizer of the kind {short(model)}; {', '.join(kinds)} are served; {REMEDY}"
        )
    return build(header, vocabulary_of(header))


def settings_of(header: Header) -> Json:
    """The tokenizer_config.json: the special tokens by name."""
    tokens = vocabulary_of(header).tokens
    names = {"bos_token": "bos", "eos_token": "eos", "unk_token": "unknown", "pad_token": "padding"}
    ids = {name: token_id(header, key) for name, key in names.items()}
    return {name: tokens[id] for name, id in ids.items() if id is not None and id < len(tokens)}


def templates_of(header: Header) -> dict[str, str]:
    """File name → chat template. Raises GgufError for one that is no text."""
    found = {}
    for key, template in header.metadata.items():
        named = TEMPLATE_KEY.fullmatch(key)
        if named is None:
            continue
        if not isinstance(template, str):
            raise GgufError(f"{header.file}: {key} is no text")
        name = named[1]
        found[f"additional_chat_templates/{name}.jinja" if name else "chat_template.jinja"] = template
    return found


def vocabulary_of(header: Header) -> Vocabulary:
    """Raises GgufError where tokens and their kinds do not fit together."""
    tokens = listed(header, "tokens", str)
    if not tokens:
        raise GgufError(f"{header.file} has no tokenizer.ggml.tokens; {REMEDY}")
    kinds = listed(header, "token_type", int) or [NORMAL] * len(tokens)
    if len(kinds) != len(tokens):
        raise GgufError(f"{header.file} has {len(tokens)} tokens and {len(kinds)} types of tokens")
    return Vocabulary(tokens, kinds)


def listed(header: Header, key: str, kind: type) -> list[Any]:
    """A list of the tokenizer's metadata, empty where it is missing. Raises GgufError for other values."""
    value = header.metadata.get(f"tokenizer.ggml.{key}", [])
    if not isinstance(value, list) or not all(type(entry) is kind for entry in value):
        raise GgufError(f"{header.file}: tokenizer.ggml.{key} is no list of {kind.__name__}")
    return value


def byte_level(header: Header, vocabulary: Vocabulary) -> Json:
    """Byte-level BPE. Raises GgufError for a way of splitting that is not known."""
    name = header.metadata.get("tokenizer.ggml.pre")
    splitting = SPLITTINGS.get(name if isinstance(name, str) else "")
    if splitting is None:
        raise GgufError(
            f"{header.file}: tokenizer.ggml.pre is {short(name)}, a way of splitting text that is not known; {REMEDY}"
        )
    known = vocabulary.known()
    model = {
        "type": "BPE",
        "ignore_merges": splitting.ignore_merges,
        "vocab": known,
        "merges": merges_of(header, known),
    }
    bytes_only = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    return {
        "version": "1.0",
        "added_tokens": added_tokens(vocabulary, known),
        "normalizer": {"type": "NFC"} if splitting.compose else None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": pre_tokenizers(splitting)},
        "post_processor": sequence([bytes_only, *ends(header, vocabulary, bos=splitting.add_bos)]),
        "decoder": bytes_only,
        "model": model,
    }


def pre_tokenizers(splitting: Splitting) -> list[Json]:
    digits = [{"type": "Digits", "individual_digits": True}] if splitting.single_digits else []
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    if splitting.regex is None:
        return [*digits, {**to_bytes, "use_regex": True}]
    split = {"type": "Split", "pattern": {"Regex": splitting.regex}, "behavior": "Isolated", "invert": False}
    return [*digits, split, {**to_bytes, "use_regex": False}]


def merges_of(header: Header, known: Mapping[str, int]) -> list[tuple[str, str]]:
    """The merges that a file lists. Raises GgufError for one whose parts or whole are no tokens."""
    pairs = []
    for merge in listed(header, "merges", str):
        left, space, right = merge.partition(" ")
        if not space or left not in known or right not in known or left + right not in known:
            raise GgufError(f"{header.file}: {short(merge)} in tokenizer.ggml.merges does not join two tokens to one")
        pairs.append((left, right))
    return pairs


def sentencepiece(header: Header, vocabulary: Vocabulary) -> Json:
    """SentencePiece BPE with bytes for what has no piece. Raises GgufError."""
    kinds = vocabulary.kinds
    tokens = [
        token.replace(" ", SPACE) if kind == USER_DEFINED else token
        for token, kind in zip(vocabulary.tokens, kinds, strict=True)
    ]
    vocabulary = Vocabulary(tokens, kinds)
    known = vocabulary.known()
    unknown = token_id(header, "unknown")
    lists_merges = header.metadata.get("tokenizer.ggml.model") == "gemma4"
    prefix = header.metadata.get("tokenizer.ggml.add_space_prefix", not lists_merges) is not False
    model = {
        "type": "BPE",
        "unk_token": tokens[unknown] if unknown is not None and unknown < len(tokens) else None,
        "fuse_unk": True,
        "byte_fallback": True,
        "vocab": known,
        "merges": merges_of(header, known) if lists_merges else merges_by_score(header, vocabulary, known),
    }
    decoders: list[Json] = [
        {"type": "Replace", "pattern": {"String": SPACE}, "content": " "},
        {"type": "ByteFallback"},
        {"type": "Fuse"},
    ]
    if prefix:
        decoders.append({"type": "Strip", "content": " ", "start": 1, "stop": 0})
    return {
        "version": "1.0",
        "added_tokens": added_tokens(vocabulary, known, strip_right=header.metadata["general.architecture"] == "phi3"),
        "normalizer": None if prefix else {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
        "pre_tokenizer": {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
        if prefix
        else None,
        "post_processor": sequence(ends(header, vocabulary, bos=True)),
        "decoder": {"type": "Sequence", "decoders": decoders},
        "model": model,
    }


def merges_by_score(header: Header, vocabulary: Vocabulary, known: Mapping[str, int]) -> list[tuple[str, str]]:
    """Every way to put a piece together of two others, the best pieces first, then the longest beginnings."""
    scores = listed(header, "scores", float)
    if len(scores) != len(vocabulary.tokens) or not all(map(math.isfinite, scores)):
        raise GgufError(f"{header.file}: tokenizer.ggml.scores must be a finite number for each token")
    merges = []
    for token, id in known.items():
        kind = vocabulary.kinds[id]
        if kind in (CONTROL, UNKNOWN, BYTE) or len(token) > MAX_PIECE_CHARS:
            continue
        score = 0.0 if kind == USER_DEFINED else scores[id]
        for cut in range(len(token) - 1, 0, -1):
            left, right = token[:cut], token[cut:]
            if left in known and right in known:
                merges.append((-score, -len(left), -len(right), left, right))
    merges.sort(key=lambda merge: merge[:3])
    return [(left, right) for *_, left, right in merges]


def added_tokens(vocabulary: Vocabulary, known: Mapping[str, int], strip_right: bool = False) -> list[Json]:
    """The tokens that are found in a text before it is split."""
    found = []
    for id, (token, kind) in enumerate(zip(vocabulary.tokens, vocabulary.kinds, strict=True)):
        special = kind in (CONTROL, UNKNOWN)
        if token and known.get(token) == id and (special or kind == USER_DEFINED):
            strip = strip_right and special and token not in ("<s>", "<unk>", "<|endoftext|>")
            entry = {"id": id, "content": token, "single_word": False, "lstrip": False, "rstrip": strip}
            found.append({**entry, "normalized": False, "special": special})
    return found


def ends(header: Header, vocabulary: Vocabulary, bos: bool) -> list[Json]:
    """What puts special tokens around a text, if any are wanted: by the file, else `bos` alone."""
    before = around(header, vocabulary, "bos", bos)
    after = around(header, vocabulary, "eos", False)
    if not before and not after:
        return []
    single = [
        *({"SpecialToken": {"id": token, "type_id": 0}} for token in before),
        {"Sequence": {"id": "A", "type_id": 0}},
    ]
    single += [{"SpecialToken": {"id": token, "type_id": 0}} for token in after]
    second = [
        *({"SpecialToken": {"id": token, "type_id": 1}} for token in before),
        {"Sequence": {"id": "B", "type_id": 1}},
    ]
    second += [{"SpecialToken": {"id": token, "type_id": 1}} for token in after]
    tokens = {token: {"id": token, "ids": [id], "tokens": [token]} for token, id in {**before, **after}.items()}
    return [{"type": "TemplateProcessing", "single": single, "pair": [*single, *second], "special_tokens": tokens}]


def around(header: Header, vocabulary: Vocabulary, name: str, default: bool) -> dict[str, int]:
    """The special token of this name and its id, where one is to be added. Raises GgufError for one that is missing."""
    wanted = header.metadata.get(f"tokenizer.ggml.add_{name}_token", default)
    id = token_id(header, name)
    if not wanted or (id is None and wanted is default):
        return {}
    if id is None or id >= len(vocabulary.tokens):
        raise GgufError(f"{header.file} asks for the token {name}, which it does not have")
    return {vocabulary.tokens[id]: id}


def sequence(processors: list[Json]) -> Json | None:
    if len(processors) < 2:
        return processors[0] if processors else None
    return {"type": "Sequence", "processors": processors}
