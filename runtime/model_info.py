"""What a model directory says about itself: config.json, generation_config.json, tokenizer files. No torch."""

import json
from pathlib import Path
from typing import Any

import msgspec

from runtime.config import ServerConfig
from runtime.embedding import Embedding, embedding, is_embedder, usable_positions
from runtime.errors import StartupError

DEMO = Path(__file__).parent / "demo"
DEFAULT_CONTEXT = 2048


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
    """A JSON object, or {} where the file is missing. Raises StartupError when it is not valid JSON."""
    if not path.is_file():
        return {}
    try:
        data = json.loads(path.read_text())
    except ValueError as error:
        raise StartupError(f"{path} is not valid JSON: {error}") from error
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
        tokens = msgspec.json.decode(file.read_bytes(), type=_TokenizerFile).added_tokens
    except msgspec.DecodeError:  # whoever loads the tokenizer says what is wrong with it
        return []
    return [token.id for token in tokens if token.content == eos]


def embeds(config: ServerConfig) -> bool:
    """Whether the model is served for embedding: by the flag, or because its architecture is for nothing else."""
    architectures = read_json(model_dir(config) / "config.json").get("architectures") or [""]
    return config.is_embedding or is_embedder(architectures[0])


def load(config: ServerConfig) -> ModelInfo:
    """Read the model directory. Raises StartupError with the cause and the flag that mends it."""
    path = model_dir(config)
    raw = read_json(path / "config.json")
    if not raw:
        raise StartupError(f"no config.json in {path}: --model-path must name a model directory or a hub id")
    text = {**raw, **raw["text_config"]} if isinstance(raw.get("text_config"), dict) else raw
    generation = read_json(path / "generation_config.json")
    architectures = raw.get("architectures") or [""]
    positions = text.get("max_position_embeddings") or text.get("n_positions") or DEFAULT_CONTEXT
    context = usable_positions(text, positions)
    if config.context_length is not None:
        if config.context_length > context:
            raise StartupError(
                f"--context-length {config.context_length} exceeds the model's {context} positions; use at most that"
            )
        context = config.context_length
    vocab_size = int(text["vocab_size"])
    ends = {*eos_ids(text, generation), *tokenizer_eos_ids(tokenizer_dir(config))}
    return ModelInfo(
        path=str(path),
        architecture=architectures[0],
        model_type=str(text.get("model_type", "")),
        vocab_size=vocab_size,
        hidden_size=int(text.get("hidden_size") or text.get("n_embd") or text.get("d_model") or text.get("dim") or 0),
        context_length=context,
        eos_ids=sorted(id for id in ends if 0 <= id < vocab_size),
        config=text,
        generation_config=generation,
        is_embedding=embeds(config),
        embedding=embedding(path, architectures[0], text) if embeds(config) else None,
    )
