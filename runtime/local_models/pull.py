"""`quartet pull OWNER/NAME[:Q4_K_M]`: fetch what `quartet serve` would fetch."""

import argparse
import os
import sys
from collections.abc import MutableMapping, Sequence
from pathlib import Path

from quartet.runtime.client.arguments import parsed
from quartet.runtime.config import ServerConfig
from quartet.runtime.errors import StartupError, UsageError
from quartet.runtime.local_models.arguments import pull_parser
from quartet.runtime.local_models.sizes import in_words, size_of
from quartet.runtime.log import plain, put, say
from quartet.runtime.model_files import gguf_directory, hub, hub_download, servable
from quartet.runtime.model_files.files import expanded
from quartet.runtime.model_files.gguf import GgufError

INTERRUPTED = 130
MAX_NAME_CHARS = 512


def main(argv: Sequence[str]) -> int:
    """Fetch one model and say where it is; returns the exit status."""
    quieten(os.environ)
    try:
        options = parsed(pull_parser(), argv)
        path = fetch(options)
    except UsageError as error:
        return fail(2, str(error))
    except StartupError as error:
        return fail(1, str(error))
    except KeyboardInterrupt:
        return fail(INTERRUPTED, "stopped; the same command continues where it was")
    put(f"{options.model} is here: {path} ({in_words(size_of(path))})")
    put(f"Serve it: quartet serve {options.model}    Talk to it: quartet chat {options.model}")
    return 0


def quieten(environment: MutableMapping[str, str]) -> None:
    """Have the hub's library say nothing but how far it is, and that to people only; it reads this when imported."""
    environment.setdefault("HF_HUB_VERBOSITY", "error")
    if not sys.stderr.isatty():
        environment.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


def fail(status: int, reason: str) -> int:
    say(f"quartet: {plain(reason)}", sys.stderr)
    return status


def fetch(options: argparse.Namespace) -> Path:
    """The directory or GGUF file that serving the model would read. Raises UsageError, StartupError."""
    name = options.model
    if name == "demo":
        raise UsageError("demo is the embedded model; it needs no download")
    if not name or len(name) > MAX_NAME_CHARS or "\0" in name:
        raise UsageError("a model of the hub is named OWNER/NAME, or OWNER/NAME:Q4_K_M for one of its GGUF files")
    if expanded(name).exists():
        raise UsageError(f"{name} is on this machine already; serve it: quartet serve {name}")
    config = ServerConfig(model_path=name, revision=options.revision, download_dir=options.download_dir)
    if match := hub.CHOICE.fullmatch(name):
        found = hub.download_gguf("model", match[1], match[2], config)
        try:
            return gguf_directory.chosen(match[1], found, match[2])
        except GgufError as error:
            there = gguf_files(match[1], options.revision)
            raise UsageError(f"{match[1]} has no one GGUF file of the type {match[2]}{there}") from error
    if not hub_download.is_hub_id(name):
        raise UsageError(f"{name!r} is no hub id; it looks like owner/name, or owner/name:Q4_K_M for a GGUF file")
    described = hub.download("model", name, config, hub.TOKENIZER)  # small, and tells whether the rest is of use
    if not (described / "config.json").is_file():
        raise UsageError(
            f"{name} is no model that can be served: it has no config.json{gguf_files(name, options.revision)}"
        )
    check(name, described)
    return hub.download("model", name, config, (*hub.WEIGHTS, *hub.TOKENIZER))


def check(name: str, directory: Path) -> None:
    """Raise StartupError for a model that would be refused both as one that generates and as one that embeds."""
    try:
        servable.check_architecture(name, directory)
    except StartupError:
        servable.check_architecture(name, directory, is_embedding=True)


def gguf_files(repository: str, revision: str | None) -> str:
    """What to type instead where a repository has GGUF files."""
    import huggingface_hub  # here, for it is slow

    try:
        files = huggingface_hub.HfApi().list_repo_files(repository, revision=revision)
    except (OSError, ValueError):  # the hub's own errors derive from these
        return ""
    choices = [Path(file).stem for file in files if file.endswith(".gguf")]
    return f"; there are {', '.join(f'{repository}:{choice}' for choice in choices[:4])}" if choices else ""
