"""LoRA adapters in peft's format: random ones with their merged bases, and some whose tokens tell which made them.

A "telling" base answers BASE_TOKEN, always, and its telling adapter number k answers FIRST_TOKEN + k: attention gives
nothing, and the adapter has the feed-forward part of the first layer point to its row of the head. Keys and values that
another adapter has computed change nothing.
"""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights.adapters import ADAPTED
from quartet.scheduler_service.weights.parameters import kind_of
from tests import checkpoints
from tests.checkpoints import layout_of

BASE_TOKEN = 9
FIRST_TOKEN = 100
TELLING = checkpoints.CONFIG["hidden_size"]  # so many telling adapters are possible


def modules_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Linear layer → shape of its weight, of a model's directory."""
    places = layout_of(base).places
    return {
        name.removesuffix(".weight"): place.shape
        for name, place in places.items()
        if len(place.shape) == 2 and kind_of(place.buffer) in ADAPTED
    }


def write_adapter(
    base: Path,
    directory: Path,
    rank: int = 4,
    seed: int = 0,
    size: float = 0.5,
    without: str = "",
    **config: Any,
) -> Path:
    """An adapter of all linear layers of a model; `rank_pattern` and so on as in adapter_config.json.

    `without`: layers whose names have this in them are left out.
    """
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (rows, columns) in modules_of(base).items():
        if without and without in module:
            continue
        own = rank_of(settings, module)
        name = f"base_model.model.{module}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(own, columns, generator=generator) * columns**-0.5
        tensors[f"{name}.lora_B.weight"] = torch.randn(rows, own, generator=generator) * size * own**-0.5
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def rank_of(settings: dict[str, Any], module: str) -> int:
    last = module.rpartition(".")[2]
    return settings.get("rank_pattern", {}).get(last, settings["r"])


def merge(base: Path, adapter: Path, directory: Path) -> Path:
    """The model whose weights have an adapter's products added."""
    shutil.copytree(base, directory)
    settings = json.loads((adapter / "adapter_config.json").read_text())
    weights, factors = load_file(base / "model.safetensors"), load_file(adapter / "adapter_model.safetensors")
    for module in modules_of(base):
        name, last = f"base_model.model.{module}", module.rpartition(".")[2]
        if f"{name}.lora_A.weight" not in factors:
            continue
        rank = rank_of(settings, module)
        alpha = settings.get("alpha_pattern", {}).get(last, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        weights[f"{module}.weight"] += factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"] * scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def telling_base(directory: Path) -> Path:
    """A model for telling adapters."""
    checkpoints.write_config(directory)
    tensors = checkpoints.version_tensors(directory, BASE_TOKEN)
    tensors["lm_head.weight"][BASE_TOKEN] = 0.1  # more than the others as long as no component of a row stands out
    tensors["lm_head.weight"][FIRST_TOKEN : FIRST_TOKEN + TELLING] = torch.eye(TELLING)
    return checkpoints.save(directory, tensors)


def telling_tensors(number: int, rank: int = 1) -> dict[str, torch.Tensor]:
    """The tensors of a telling adapter; those of a higher rank have zeros behind the first row."""
    hidden, width = checkpoints.CONFIG["hidden_size"], checkpoints.CONFIG["intermediate_size"]
    tensors = {}
    for module, rows, columns in (("gate", width, hidden), ("up", width, hidden), ("down", hidden, width)):
        a, b = torch.zeros(rank, columns), torch.zeros(rows, rank)
        if module == "down":
            a[0, 0], b[number, 0] = 1.0, 1.0
        else:
            a[0], b[0, 0] = 1 / columns, 10.0
        name = f"base_model.model.model.layers.0.mlp.{module}_proj"
        tensors |= {f"{name}.lora_A.weight": a, f"{name}.lora_B.weight": b}
    return tensors


def telling_settings(rank: int = 1) -> dict[str, Any]:
    """What adapter_config.json says of it."""
    target_modules = ["gate_proj", "up_proj", "down_proj"]
    return {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": target_modules}


def telling_adapter(directory: Path, number: int, rank: int = 1) -> Path:
    """A telling adapter on the disk."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "adapter_config.json").write_text(json.dumps(telling_settings(rank)))
    save_file(telling_tensors(number, rank), directory / "adapter_model.safetensors")
    return directory
