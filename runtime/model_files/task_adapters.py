"""Embedders that have a LoRA adapter for each task: jina-embeddings-v3, in two layouts.

Its makers' layout has the factors of all tasks in the checkpoint, beside each weight. That of transformers
(jina-embeddings-v3-hf) has a folder for each task, in peft's format. config.json names the tasks in both.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.files import present
from quartet.runtime.shorten import short

Json = Mapping[str, Any]

FAMILY = "JinaEmbeddingsV3"
MAKERS_FAMILY = "XLMRoberta"  # under whose name the makers' own code goes
MAKERS_MODEL = "XLMRobertaLoRA"
TASK = re.compile(r"\w[\w.-]{0,63}")
MAX_TASKS = 64
WEIGHTS = "adapter_model.safetensors"  # in a task's folder


def architecture_of(architecture: str, config: Json) -> str:
    """The architecture that a config.json means: the makers' code goes under the name of another one."""
    if architecture == MAKERS_MODEL:
        return f"{FAMILY}Model"
    if config.get("position_embedding_type") == "rotary" and architecture.startswith(MAKERS_FAMILY):
        return FAMILY + architecture.removeprefix(MAKERS_FAMILY)
    return architecture


def has_tasks(architecture: str, config: Json) -> bool:
    """Whether config.json names tasks that the model has adapters for, here or elsewhere."""
    return architecture.startswith(FAMILY) and bool(config.get("lora_adaptations"))


def is_makers_layout(config: Json) -> bool:
    return config.get("model_type") != "jina_embeddings_v3"


def tasks_of(path: Path, architecture: str, config: Json) -> dict[str, str]:
    """The tasks with an adapter in this directory, and their folders; "": it is in the checkpoint.

    Raises StartupError for names that cannot be those of tasks.
    """
    if not has_tasks(architecture, config):
        return {}
    names = named(path, "lora_adaptations", config["lora_adaptations"], list[str])
    wrong = next((name for name in names if not TASK.fullmatch(name)), None)
    if wrong is not None or len(names) > MAX_TASKS or len(set(names)) < len(names):
        raise StartupError(f"{path}/config.json: lora_adaptations must name at most {MAX_TASKS} different tasks")
    if is_makers_layout(config):
        return dict.fromkeys(names, "") if config.get("load_trained_adapters", True) else {}
    folders = {name: re.sub(r"\W", "_", name) for name in names}
    return {name: folder for name, folder in folders.items() if present(path / folder / WEIGHTS)}


def instructions_of(path: Path, config: Json) -> dict[str, str]:
    """The texts that stand before others, by task. Raises StartupError."""
    given = config.get("task_instructions")
    return {} if given is None else named(path, "task_instructions", given, dict[str, str])


def default_of(path: Path, config: Json, tasks: Mapping[str, str]) -> str:
    """The task of requests that name none; "": the base computes them. Raises StartupError."""
    default = config.get("default_task") or ""
    if default and default not in tasks:
        raise StartupError(
            f"{path}/config.json: default_task is {short(default)}, and the adapters here are {', '.join(tasks)}"
        )
    return str(default)


def named(path: Path, field: str, given: Any, kind: Any) -> Any:
    """The value of a field in a type. Raises StartupError."""
    try:
        return msgspec.convert(given, kind)
    except msgspec.ValidationError as error:
        raise StartupError(f"{path}/config.json: {field}: {short(error)}") from error
