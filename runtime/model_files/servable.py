"""What a model directory is where it is no model that can be served, found before anything slow is imported.

Each refusal is a StartupError of one line that says what was found and what to do instead.
"""

import functools
import importlib.metadata
import importlib.util
import os
import pwd
import re
import stat
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files import embedding, families
from quartet.runtime.model_files.files import opened
from quartet.runtime.model_files.model_info import NO_CONFIG, read_json
from quartet.runtime.model_files.task_adapters import architecture_of
from quartet.runtime.model_files.towers import TOWERS
from quartet.runtime.shorten import short

READ = ("*.json", "*.jinja", "*.model", "*.safetensors", "*.bin", "*.gguf")  # the files that a server may open
LFS_POINTER = b"version https://git-lfs"
LAYOUTS = {  # a file that tells of what a directory is, and what to do
    "adapter_config.json": (
        "{path} is a LoRA adapter{base}, which is no base for another one; name a whole model by --model-path"
    ),
    "model_index.json": "{path} makes images (a pipeline of diffusers), and Quartet serves text; name a language model",
    "params.json": (
        "{path} has the weights in their maker's own layout (params.json, no config.json); take the copy of the model "
        "in Hugging Face's layout (its name often ends in -hf), or a GGUF file"
    ),
}
CAUSAL_MODELS = re.compile(r"^MODEL_FOR_CAUSAL_LM_MAPPING_NAMES = OrderedDict\(\s*\[(.*?)^    \]", re.S | re.M)
VERSION = re.compile(r"(\d{1,6})\.(\d{1,6})\.(\d{1,6})")
ENTRY = re.compile(r'\("([\w.-]+)", "(\w+)"\)')
SENSES = ("vision_config", "audio_config", "vision_tower", "mm_vision_tower", "image_size", "num_mel_bins")

Json = Mapping[str, Any]


def check_path(flag: str, path: Path) -> None:
    """Raise StartupError for a path that may not be looked at; one that is not there passes."""
    try:
        path.stat()
    except PermissionError as error:
        raise StartupError(f"{flag} {path}: {denied(path.parent)}") from error
    except (OSError, ValueError):
        return


def check_file(path: Path) -> None:
    """Raise StartupError for a file that cannot be read, or that stands for one that was not fetched."""
    if path.is_symlink() and not path.exists():
        raise StartupError(f"{path} leads to {short(path.readlink())}, which is not there; download the model again")
    if not path.is_file():
        return
    if not os.access(path, os.R_OK, effective_ids=True):
        raise StartupError(denied(path))
    with opened(path) as descriptor:
        if os.pread(descriptor, len(LFS_POINTER), 0) == LFS_POINTER:
            raise StartupError(
                f"{path} is a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent} (with "
                "git-lfs installed), or download the model again"
            )


def check_files(directory: Path) -> None:
    """Raise StartupError for a directory, or the first file that matters in it, that cannot be read."""
    if not os.access(directory, os.R_OK | os.X_OK, effective_ids=True):
        raise StartupError(denied(directory))
    for pattern in READ:
        for path in sorted(directory.glob(pattern)):
            check_file(path)


def denied(path: Path) -> str:
    """Who may not read what, and how that is changed."""
    allowed = "a+rx" if path.is_dir() else "a+r"
    try:
        about = path.stat()
        whose = f"it belongs to {user(about.st_uid)}, mode {stat.S_IMODE(about.st_mode):o}, and this is "
    except OSError:
        whose = "this is "
    return f"cannot read {path}: permission denied ({whose}{user(os.geteuid())}); chmod {allowed} makes it readable"


def user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def is_known_layout(directory: Path) -> bool:
    """Whether `refuse_without_config` knows what a directory is."""
    return any((directory / name).is_file() for name in LAYOUTS)


def refuse_without_config(directory: Path) -> None:
    """Raise StartupError for a directory without a config.json: what it is, as far as its files tell."""
    for name, text in LAYOUTS.items():
        if (directory / name).is_file():
            settings = read_json(directory / name)
            base = settings.get("base_model_name_or_path")
            raise StartupError(text.format(path=directory, base=f" of {short(base)}" if base else ""))
    if inside := sorted((*directory.glob("*/config.json"), *directory.glob("snapshots/*/config.json"))):
        raise StartupError(f"no config.json in {directory}; did you mean {inside[0].parent}?")
    raise StartupError(NO_CONFIG.format(directory))


def check_architecture(name: str, directory: Path, is_embedding: bool = False) -> None:
    """Raise StartupError for a model that the scheduler would refuse, which would take it seconds to say.

    `name`: as the operator gave it.
    """
    config = read_json(directory / "config.json")
    if reason := refusal(config, causal_models(), is_embedding):
        raise StartupError(f"{name} {reason}")


def refusal(config: Json, known: Json, is_embedding: bool = False) -> str:
    """Why a model is served neither by a family of ours nor by transformers; "" where it may be.

    `known`: by model type, the causal language models of transformers, those that we serve ourselves among them.
    """
    named = config.get("architectures") or [""]
    architecture = architecture_of(str(named[0] if isinstance(named, list) else named), config)
    model_type = str(config.get("model_type") or "")
    if not (known and architecture and model_type) or embedding.is_encoder(architecture):
        return ""  # nothing can be said here; whoever loads it will
    embeds = is_embedding or embedding.is_embedder(architecture)
    if architecture in TOWERS and not embeds:
        return ""
    if architecture in known.values() or (not embeds and model_type in known and not config.get("is_encoder_decoder")):
        return ""
    if embeds and f"{embedding.family_name(architecture)}ForCausalLM" in known.values():
        return ""
    shown = short(architecture)
    if auto_map := config.get("auto_map"):
        return (
            f"has code of its own ({short(auto_map)}), and Quartet never runs code from a model directory (there is no "
            "--trust-remote-code); take a copy of the model that transformers knows without it (its name often ends in "
            "-hf), or a GGUF file"
        )
    if any(config.get(key) is not None for key in SENSES):
        return f"is a model of images or sound ({shown}), and Quartet serves text; name a language model"
    if config.get("is_encoder_decoder"):
        return f"is an encoder-decoder ({shown}), and Quartet serves decoders; name a model that ends in ForCausalLM"
    near = families.nearest(architecture)
    ours = f" (the nearest name that Quartet computes is {near})" if near else ""
    return (
        f"is a {shown}, which neither Quartet nor the installed transformers knows as a language model{ours}; "
        f"{newer_transformers(config)}"
    )


def newer_transformers(config: Json) -> str:
    """Whether a newer transformers would know a model, as far as the one that saved it tells."""
    saved, installed = str(config.get("transformers_version") or ""), installed_transformers()
    theirs, ours = VERSION.match(saved), VERSION.match(installed)
    if theirs is None or ours is None:
        return "a newer transformers may (pip install -U transformers)"
    if tuple(map(int, theirs.groups())) > tuple(map(int, ours.groups())):
        return (
            f"it was saved by transformers {short(saved)} and {installed} is installed: that one or a newer one may "
            "know it (pip install -U transformers)"
        )
    return (
        f"it was saved by transformers {short(saved)}, which is not newer than the installed {installed}: it was made "
        "with code of its own, or under another name, and a newer transformers will hardly know it"
    )


def installed_transformers() -> str:
    """The version of transformers; "" where there is none."""
    try:
        return importlib.metadata.version("transformers")
    except importlib.metadata.PackageNotFoundError:
        return ""


@functools.cache
def causal_models() -> dict[str, str]:
    """The causal language models of transformers, model type → class, read from its source: an import takes seconds.

    Empty where there is no transformers, or one that keeps its table in another way.
    """
    spec = importlib.util.find_spec("transformers")
    if spec is None or spec.origin is None:
        return {}
    table = Path(spec.origin).parent / "models" / "auto" / "modeling_auto.py"
    found = CAUSAL_MODELS.search(table.read_text(encoding="utf-8")) if table.is_file() else None
    return dict(ENTRY.findall(found[1])) if found else {}
