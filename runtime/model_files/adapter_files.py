"""Finds the directories of LoRA adapters, and the base of an adapter that is named as the model."""

import logging
from pathlib import Path

import msgspec

from quartet.runtime.adapter_sources import AdapterSource
from quartet.runtime.config import ResolvedConfig, ServerConfig
from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import hub_download, servable
from quartet.runtime.model_files.files import expanded
from quartet.runtime.model_files.model_info import read_json
from quartet.runtime.shorten import short

log = logging.getLogger(__name__)

SETTINGS = "adapter_config.json"
FILES = (SETTINGS, "adapter_model.safetensors", "adapter_model.bin")
NOT_THERE = "{} does not exist; an adapter is a directory or a hub id (owner/name)"
NO_SETTINGS = "{} has no adapter_config.json, so it is no LoRA adapter in peft's format"
NO_BASE = "{} is a LoRA adapter, and names no base; name it: --model-path BASE --lora-paths NAME={}"
BASE_MISSING = (
    "{} is a LoRA adapter of {}, which cannot be had ({}); name its base: --model-path BASE --lora-paths {}={}"
)


def is_adapter(directory: Path) -> bool:
    """Whether a directory holds an adapter and no whole model."""
    return (directory / SETTINGS).is_file() and not (directory / "config.json").is_file()


def find(label: str, name: str, config: ServerConfig) -> Path:
    """The local directory of an adapter, fetched from the hub if need be. Raises StartupError beginning with `label`.

    Of the configuration, only where downloads are kept counts: --revision is of the model.
    """
    path = expanded(name)
    servable.check_path(label, path)
    if path.is_dir():
        found = path.resolve()
    elif hub_download.is_hub_id(name):
        found = hub_download.snapshot(label, name, config, FILES, revision=None)
    else:
        raise StartupError(NOT_THERE.format(f"{label} {name}"))
    servable.check_files(found)
    if not (found / SETTINGS).is_file():
        raise StartupError(NO_SETTINGS.format(f"{label} {name}"))
    return found


def locate(config: ResolvedConfig) -> ResolvedConfig:
    """The configuration with the directories of all adapters of --lora-paths. Raises StartupError."""
    if not config.adapters:
        return config
    found = [
        source if source.directory else with_directory(source, find("--lora-paths", source.lora_path, config))
        for source in config.adapters
    ]
    return msgspec.structs.replace(config, adapters=found)


def with_directory(source: AdapterSource, directory: Path) -> AdapterSource:
    return msgspec.structs.replace(source, directory=str(directory))


def on_its_base(config: ResolvedConfig, directory: Path) -> ResolvedConfig:
    """The configuration of a server whose --model-path is an adapter: its base as the model, and the adapter.

    The adapter is named as its directory or repository. Raises StartupError where it names no base.
    """
    given = config.model_path
    base = read_json(directory / SETTINGS).get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        raise StartupError(NO_BASE.format(given, given))
    path = expanded(given)
    name = path.resolve().name if path.is_dir() else path.name
    if any(source.lora_name == name for source in config.adapters):
        raise StartupError(f"--lora-paths has an adapter {name}, which is also the name of --model-path {given}")
    own = AdapterSource(lora_name=name, lora_path=given, directory=str(directory))
    return msgspec.structs.replace(config, model_path=base, enable_lora=True, adapters=[own, *config.adapters])


def base_missing(config: ResolvedConfig, given: str, cause: StartupError) -> StartupError:
    """What to say where the base of an adapter that was named as the model is not to be had."""
    name = config.adapters[0].lora_name
    return StartupError(BASE_MISSING.format(given, short(config.model_path), cause, name, given))


def tell_of_both(config: ResolvedConfig, given: str) -> None:
    """Log which requests an adapter that was named as the model answers."""
    name, base = config.adapters[0].lora_name, config.model_path
    log.info("%s is a LoRA adapter of %s: requests for %s use it, all others the base", given, short(base), short(name))
