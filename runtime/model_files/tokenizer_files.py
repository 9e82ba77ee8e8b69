"""Loads a model's tokenizer as transformers' AutoTokenizer would, from tokenizer.json and without transformers.

Shared by the two text services. `tokenizers` is imported when a tokenizer is wanted and not before, so the launcher
may import this module for nothing.
"""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.files import MAX_TOKENIZER_BYTES, present, read_small_text
from quartet.runtime.model_files.model_info import read_json

if TYPE_CHECKING:
    from tokenizers import AddedToken, Tokenizer

NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
OLDER_LAYOUTS = ("vocab*", "*.model", "*.tiktoken", "tekken.json")
CONVERTER = "quartet.tokenizer_service.convert"  # run as a process: transformers weighs 250 MiB and would stay
CONVERTER_TIMEOUT_S = 300
REMEDY = "name a directory that has one with --tokenizer-path, or start with --skip-tokenizer-init"


def load(path: Path) -> "Tokenizer":
    """The tokenizer of a model directory, never padding or cutting. Raises StartupError naming the cause."""
    file = path / "tokenizer.json"
    tokenizer = _parse(read_small_text(file, MAX_TOKENIZER_BYTES) if present(file) else _converted(path), file)
    settings = read_json(path / "tokenizer_config.json")
    if _is_sentencepiece_llama(tokenizer, settings, read_json(path / "config.json")):
        _split_as_llama(tokenizer, settings)
    try:
        _add_missing_tokens(tokenizer, settings, read_json(path / "special_tokens_map.json"))
    except (TypeError, ValueError, AttributeError) as error:
        raise StartupError(f"the tokens that files beside {file} declare cannot be read: {error}; {REMEDY}") from error
    tokenizer.encode_special_tokens = bool(settings.get("split_special_tokens", False))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def _parse(source: str, file: Path) -> "Tokenizer":
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_str(source)
    except Exception as error:  # tokenizers raises nothing narrower
        raise StartupError(f"{file} cannot be read as a tokenizer: {error}; {REMEDY}") from error


def _converted(path: Path) -> str:
    """What transformers makes of vocabulary files in an older layout, as tokenizer.json."""
    if not any(file for pattern in OLDER_LAYOUTS for file in path.glob(pattern)):
        raise StartupError(f"no tokenizer.json in {path}; {REMEDY}")
    command = [sys.executable, "-m", CONVERTER, str(path)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=CONVERTER_TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise StartupError(
            f"{path} has no tokenizer.json, and making one took more than {CONVERTER_TIMEOUT_S} s; {REMEDY}"
        ) from error
    if done.returncode != 0:
        cause = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise StartupError(f"{path} has no tokenizer.json and none can be made from it ({cause}); {REMEDY}")
    return done.stdout


def _is_sentencepiece_llama(tokenizer: "Tokenizer", settings: dict[str, Any], model: dict[str, Any]) -> bool:
    """Llama 1, Llama 2 and their kin, whose spaces transformers splits by a rule of its own, not by tokenizer.json."""
    named = str(settings.get("tokenizer_class", "")).removesuffix("Fast") == "LlamaTokenizer"
    decoder = b"" if tokenizer.decoder is None else tokenizer.decoder.__getstate__()
    return named and model.get("model_type") == "llama" and b"ByteLevel" not in decoder


def _split_as_llama(tokenizer: "Tokenizer", settings: dict[str, Any]) -> None:
    from tokenizers import decoders, pre_tokenizers

    prefix = settings.get("add_prefix_space") is not False
    scheme = ("always" if settings.get("legacy") else "first") if prefix else "never"
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme=scheme, split=False)
    tokenizer.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)


def _add_missing_tokens(tokenizer: "Tokenizer", settings: dict[str, Any], names: dict[str, Any]) -> None:
    """Add the tokens that only the files beside tokenizer.json declare.

    Their add_bos_token and add_eos_token are not read: beside a tokenizer.json its post-processor alone decides.
    """
    known = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    for token in _declared_tokens(settings, names):
        if token.content and token.content not in known:
            known.add(token.content)
            tokenizer.add_tokens([token])


def _declared_tokens(settings: dict[str, Any], names: dict[str, Any]) -> "list[AddedToken]":
    from tokenizers import AddedToken

    by_id = settings.get("added_tokens_decoder") or {}
    tokens = [AddedToken(**entry) for _, entry in sorted(by_id.items(), key=lambda item: int(item[0]))]
    sources = settings if "added_tokens_decoder" in settings else {**settings, **names}
    named = [sources.get(name) for name in NAMED_TOKENS]
    extra = sources.get("extra_special_tokens") or sources.get("additional_special_tokens") or []
    for token in [*named, *(extra.values() if isinstance(extra, dict) else extra)]:
        content = token.get("content") if isinstance(token, dict) else token
        if content:
            tokens.append(AddedToken(content, special=True, normalized=False))
    return tokens


def add_marks(tokenizer: "Tokenizer", marks: Iterable[str]) -> None:
    """Have the marks before a multi-vector model's texts read as one token, where the vocabulary has it."""
    from tokenizers import AddedToken

    for mark in marks:
        known = next((form for form in (mark, mark.strip()) if form and tokenizer.token_to_id(form) is not None), None)
        if known is not None and tokenizer.encode(known, add_special_tokens=False).tokens != [known]:
            tokenizer.add_special_tokens([AddedToken(known, special=True, normalized=False)])


def filler_id(tokenizer: "Tokenizer", path: Path, token: str | None) -> int:
    """The token that fills queries up: `token`, else the mask of the files in `path`. Raises StartupError."""
    settings = read_json(path / "special_tokens_map.json") | read_json(path / "tokenizer_config.json")
    named = token or settings.get("mask_token") or settings.get("eos_token")
    name = named.get("content") if isinstance(named, dict) else named
    found = tokenizer.token_to_id(name) if isinstance(name, str) else None
    if found is None:
        raise StartupError(f"{path} has no token to fill queries up with (mask_token), as the model's files ask for")
    return found
