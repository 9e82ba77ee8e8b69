"""What a model directory says about itself: config.json, generation_config.json, tokenizer files. No torch."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import files, model_ranges
from quartet.runtime.model_files.embedding import Embedding, check_cuts, embedding, is_embedder, usable_positions
from quartet.runtime.model_files.model_ranges import BadValue
from quartet.runtime.model_files.task_adapters import architecture_of
from quartet.runtime.model_files.towers import text_config

DEMO = Path(__file__).parent / "demo"
DEFAULT_CONTEXT = 2048
NO_CONFIG = (
    "no config.json in {}; --model-path takes a directory that has one, a GGUF file, a hub id (owner/name) or demo"
)
STRETCHING = ("linear", "dynamic", "yarn")


class ModelInfo(msgspec.Struct, kw_only=True):
    """The facts that services share about the served model."""

    path: str  # local directory
    architecture: str
    model_type: str
    vocab_size: int
    hidden_size: int
    context_length: int
    eos_ids: list[int]
    config: dict[str, Any]  # config.json, the text part for models that wrap one
    generation_config: dict[str, Any] = {}
    is_embedding: bool = False
    embedding: Embedding | None = None  # how it embeds, where it does


def local_path(model_path: str) -> Path:
    """The directory of `demo` or of a local model (hub ids are downloaded by the launcher, see `model_dir`)."""
    return DEMO if model_path == "demo" else Path(model_path)


def model_dir(config: ServerConfig) -> Path:
    """Where the model's files are: the directory that the launcher found, or model_path itself."""
    return Path(config.model_dir) if config.model_dir else local_path(config.model_path)


def tokenizer_dir(config: ServerConfig) -> Path:
    """Where the tokenizer's files are: by default beside the model."""
    if config.tokenizer_dir:
        return Path(config.tokenizer_dir)
    return local_path(config.tokenizer_path) if config.tokenizer_path else model_dir(config)


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object, or {} where the file is missing. Raises StartupError for one that cannot be read."""
    if not files.present(path):
        return {}
    try:
        data = json.loads(files.read_small_text(path, files.MAX_SETTINGS_BYTES))
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
    except RecursionError as error:
        raise StartupError(f"{path} is nested too deeply") from error
    if not isinstance(data, dict):
        raise StartupError(f"{path} must hold a JSON object")
    return data


def eos_ids(config: dict[str, Any], generation: dict[str, Any]) -> list[int]:
    """End-of-sequence ids named by either file."""
    found: set[int] = set()
    for source in (config, generation):
        value = source.get("eos_token_id")
        found.update(value if isinstance(value, list) else [] if value is None else [value])
    return sorted(found)


class _AddedToken(msgspec.Struct):
    id: int
    content: str


class _TokenizerFile(msgspec.Struct):
    """The part of tokenizer.json that is wanted here."""

    added_tokens: list[_AddedToken] = []


def tokenizer_eos_ids(directory: Path) -> list[int]:
    """The id of what a tokenizer's files call eos_token: a chat model's own may be named nowhere else."""
    settings = read_json(directory / "special_tokens_map.json") | read_json(directory / "tokenizer_config.json")
    named = settings.get("eos_token")
    eos = named.get("content") if isinstance(named, dict) else named
    file = directory / "tokenizer.json"
    if not eos or not file.is_file():
        return []
    try:
        content = files.read_small(file, files.MAX_TOKENIZER_BYTES)
        tokens = msgspec.json.decode(content, type=_TokenizerFile).added_tokens
    except (msgspec.DecodeError, RecursionError):  # whoever loads the tokenizer says what is wrong with it
        return []
    return [token.id for token in tokens if token.content == eos]


def embeds(config: ServerConfig) -> bool:
    """Whether the model is served for embedding: by the flag, or because its architecture is for nothing else."""
    return config.is_embedding or is_embedder(read_config(model_dir(config)).architecture)


class ModelConfig(NamedTuple):
    """A config.json whose values were found sane."""

    architecture: str
    text: dict[str, Any]  # the text part, for models that wrap one


def read_config(path: Path) -> ModelConfig:
    """The config.json of a directory. Raises StartupError, naming the field where a value cannot be."""
    raw = read_json(path / "config.json")
    text = text_config(raw)
    try:
        text = model_ranges.checked(text)
        architectures = raw.get("architectures") or [""]
        model_ranges.check_value("architectures", architectures, model_ranges.FIELDS["architectures"])
    except BadValue as error:
        raise StartupError(f"{path / 'config.json'}: {error}") from error
    return ModelConfig(architecture_of(architectures[0], text), text)


def positions_of(config: Mapping[str, Any]) -> int:
    """How many tokens a model was made for; ropes that are stretched beyond their training reach further by a factor.

    Not so where the config's own number includes it: where it also tells that of pretraining, and in Gemma 3.
    """
    named = (config.get(name) for name in ("max_position_embeddings", "n_positions", "model_max_length"))
    positions: int = next(filter(None, named), DEFAULT_CONTEXT)
    rope = {**(config.get("rope_scaling") or {}), **(config.get("rope_parameters") or {})}
    kind = rope.get("rope_type") or rope.get("type")
    original = rope.get("original_max_position_embeddings") or config.get("original_max_position_embeddings")
    if kind in STRETCHING and not original and not str(config.get("model_type", "")).startswith("gemma3"):
        return min(int(positions * (rope.get("factor") or 1)), model_ranges.MAX_POSITIONS)
    return positions


def load(config: ServerConfig) -> ModelInfo:
    """Read the model directory. Raises StartupError with the cause and the flag that mends it."""
    path = model_dir(config)
    if not files.present(path / "config.json"):
        raise StartupError(NO_CONFIG.format(path))
    architecture, text = read_config(path)
    generation = read_json(path / "generation_config.json")
    context = usable_positions(text, positions_of(text))
    if config.context_length is not None:
        if config.context_length > context:
            raise StartupError(
                f"--context-length {config.context_length} exceeds the model's {context} positions; use at most that"
            )
        context = config.context_length
    if (vocab_size := text.get("vocab_size")) is None:
        raise StartupError(
            f"{path / 'config.json'}: vocab_size is not there; it must be {model_ranges.FIELDS['vocab_size']}"
        )
    try:
        model_ranges.walk_ids(generation)
    except BadValue as error:
        raise StartupError(f"{path / 'generation_config.json'}: {error}") from error
    ends = {*eos_ids(text, generation), *tokenizer_eos_ids(tokenizer_dir(config))}
    hidden_size = int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or text.get("dim") or 0)
    embedder = embedding(path, architecture, text) if embeds(config) else None
    if embedder is not None:
        check_cuts(embedder, path, hidden_size)
    return ModelInfo(
        path=str(path),
        architecture=architecture,
        model_type=str(text.get("model_type", "")),
        vocab_size=vocab_size,
        hidden_size=hidden_size,
        context_length=context,
        eos_ids=sorted(id for id in ends if 0 <= id < vocab_size),
        config=text,
        generation_config=generation,
        is_embedding=embedder is not None,
        embedding=embedder,
    )
