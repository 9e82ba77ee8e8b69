"""Finds a model's directory: the embedded one, a local one, one made of a GGUF file, or a download from the hub.

Only the launcher calls this; services read `config.model_dir` and `config.tokenizer_dir`.
"""

import re
from pathlib import Path

import msgspec

from quartet.runtime.config import ResolvedConfig, ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import adapter_files, gguf_directory, hub_download, servable
from quartet.runtime.model_files.files import expanded
from quartet.runtime.model_files.model_info import DEMO

CHOICE = re.compile(r"(.+):([\w.-]+)")  # a directory or hub id, and which of its GGUF files is meant
NOT_THERE = "{} does not exist; it takes a directory, a hub id (owner/name), a GGUF file or demo"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
PICKLED = ("pytorch_model*.bin", "pytorch_model.bin.index.json", "adapter_model.bin")  # where a model has no others
TOKENIZER = ("*.json", "*.txt", "*.model", "*.jinja")


def locate(config: ResolvedConfig, run_dir: Path | None = None) -> ResolvedConfig:
    """The configuration with the local directories filled in, on its base where the model is an adapter.

    Raises StartupError.

    `run_dir`: where a directory that is made of a GGUF file may lie.
    """
    own_tokenizer = config.tokenizer_path is None and not config.skip_tokenizer_init
    patterns = (*WEIGHTS, *TOKENIZER)

    def found_model(config: ResolvedConfig) -> Path:
        found = find("--model-path", config.model_path, config, patterns, run_dir, with_tokenizer=own_tokenizer)
        servable.check_files(found)
        return found

    model_dir = found_model(config)
    if adapter_files.is_adapter(model_dir):
        given, config = config.model_path, adapter_files.on_its_base(config, model_dir)
        try:
            model_dir = found_model(config)
        except StartupError as error:
            raise adapter_files.base_missing(config, given, error) from error
        adapter_files.tell_of_both(config, given)
    config = adapter_files.locate(config)
    if not (model_dir / "config.json").is_file():
        servable.refuse_without_config(model_dir)
    servable.check_architecture(config.model_path, model_dir, config.is_embedding)
    tokenizer_dir = model_dir
    if config.tokenizer_path is not None:
        tokenizer_dir = find("--tokenizer-path", config.tokenizer_path, config, TOKENIZER, run_dir)
    return msgspec.structs.replace(config, model_dir=str(model_dir), tokenizer_dir=str(tokenizer_dir))


def find(
    flag: str,
    name: str,
    config: ServerConfig,
    patterns: tuple[str, ...],
    run_dir: Path | None = None,
    with_tokenizer: bool = True,
) -> Path:
    """The local directory that `name` stands for, downloaded or made of a GGUF file if need be. Raises StartupError."""
    if name == "demo":
        return DEMO
    path = expanded(name)
    servable.check_path(flag, path)
    if name and path.is_dir():
        if not gguf_directory.is_model(path):
            return path.resolve()
        path = gguf_directory.chosen(name, path, None)
    elif (match := CHOICE.fullmatch(name)) and not path.exists():
        base = expanded(match[1])
        found = base if base.is_dir() else download_gguf(flag, match[1], match[2], config)
        path = gguf_directory.chosen(match[1], found, match[2])
    servable.check_file(path)
    if path.is_file():
        if not gguf_directory.is_gguf(path):
            raise StartupError(f"{flag} {name} is a file; name the directory that holds it, or a GGUF file")
        assert run_dir is not None, name
        return gguf_directory.described(path, run_dir, with_tokenizer)
    if name.lower().endswith(gguf_directory.SUFFIX):
        raise StartupError(f"{flag} {name}: there is no such file; one on the hub is named as owner/name:Q4_K_M")
    if not hub_download.is_hub_id(name):
        raise StartupError(NOT_THERE.format(f"{flag} {name}"))
    if set(WEIGHTS) <= set(patterns):
        check_before_weights(flag, name, config)
    return download(flag, name, config, patterns)


def check_before_weights(flag: str, name: str, config: ServerConfig) -> None:
    """Fetch what describes a model of the hub, which is little, and raise StartupError where it cannot be served."""
    described = download(flag, name, config, TOKENIZER)
    if (described / "config.json").is_file():
        servable.check_architecture(name, described, config.is_embedding)
    elif adapter_files.is_adapter(described):
        return
    elif servable.is_known_layout(described):
        servable.refuse_without_config(described)
    else:
        raise StartupError(
            f"{flag} {name} has no config.json on the hub; if it has GGUF files, name one: {name}:Q4_K_M"
        )


def download_gguf(flag: str, name: str, choice: str, config: ServerConfig) -> Path:
    """The hub's snapshot with the GGUF files of one type. Raises StartupError."""
    if not hub_download.is_hub_id(name):
        raise StartupError(NOT_THERE.format(f"{flag} {name}:{choice}"))
    spellings = {
        choice.removesuffix(".gguf"),
        choice.lower().removesuffix(".gguf"),
        choice.upper().removesuffix(".GGUF"),
    }
    before = ("", "*[-_./]")  # a whole word of the name
    behind = (".gguf", "-0*-of-0*.gguf")
    return download(flag, name, config, tuple(f"{b}{s}{e}" for s in sorted(spellings) for b in before for e in behind))


def download(flag: str, name: str, config: ServerConfig, patterns: tuple[str, ...]) -> Path:
    """The hub's snapshot, from its cache where that is complete. Raises StartupError."""
    found = hub_download.snapshot(flag, name, config, patterns, config.revision)
    wants_weights = set(WEIGHTS) <= set(patterns) and not set(PICKLED) <= set(patterns)
    if wants_weights and not any(found.glob("*.safetensors")):
        return download(flag, name, config, (*patterns, *PICKLED))
    return found
