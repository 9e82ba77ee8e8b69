"""The texts of a model's chat templates. Nothing is compiled here, so that no jinja is needed to look at one."""

from pathlib import Path
from typing import Any

import msgspec

from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.files import MAX_TEMPLATE_BYTES, present, read_small_text
from quartet.runtime.model_files.model_info import ModelInfo, read_json, tokenizer_dir


def template_dir(info: ModelInfo, config: ServerConfig) -> Path:
    """Where the templates are: beside the tokenizer."""
    return tokenizer_dir(config) if config.tokenizer_path else Path(info.path)


def template_sources(directory: Path, chosen: str | None) -> dict[str, str]:
    """Template by name, empty where there is none. `chosen`: `--chat-template`. Raises StartupError."""
    if chosen is not None:
        return {"default": _chosen_source(chosen)}
    return _sources_of(directory) or _sources_in(read_json(directory / "tokenizer_config.json"))


def bundled() -> dict[str, Path]:
    """The templates that `--chat-template` knows by name."""
    return {file.stem: file for file in sorted((Path(__file__).parent / "templates").glob("*.jinja"))}


def _chosen_source(name: str) -> str:
    """The text of `--chat-template`: a file, or the name of a bundled template."""
    path = Path(name) if present(Path(name)) else bundled().get(name)
    if path is None:
        raise StartupError(f"--chat-template {name!r} is neither a file nor one of: {', '.join(bundled())}")
    return read_small_text(path, MAX_TEMPLATE_BYTES)


def _sources_of(directory: Path) -> dict[str, str]:
    """Template files beside the tokenizer."""
    files = {file.stem: file for file in sorted((directory / "additional_chat_templates").glob("*.jinja"))}
    if present(directory / "chat_template.jinja"):
        files["default"] = directory / "chat_template.jinja"
    return {name: read_small_text(file, MAX_TEMPLATE_BYTES) for name, file in files.items()}


class _Named(msgspec.Struct):
    name: str
    template: str


def _sources_in(tokenizer_config: dict[str, Any]) -> dict[str, str]:
    """Templates inside tokenizer_config.json: one text, or a list of named ones."""
    value = tokenizer_config.get("chat_template")
    if value is None:
        return {}
    try:
        found = msgspec.convert(value, str | list[_Named])
    except msgspec.ValidationError as error:
        raise StartupError(f"chat_template in tokenizer_config.json: {error}") from error
    return {"default": found} if isinstance(found, str) else {named.name: named.template for named in found}
