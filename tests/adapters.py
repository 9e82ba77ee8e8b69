"""Random LoRA adapters in peft's format, and the same adapters merged into their base, to compare with."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quartet.scheduler_service.weights.adapters import ADAPTED
from quartet.scheduler_service.weights.parameters import kind_of
from tests.checkpoints import layout_of


def modules_of(base: Path) -> dict[str, tuple[int, ...]]:
    """Linear layer → shape of its weight, of a model's directory."""
    places = layout_of(base).places
    return {
        name.removesuffix(".weight"): place.shape
        for name, place in places.items()
        if len(place.shape) == 2 and kind_of(place.buffer) in ADAPTED
    }


def write_adapter(base: Path, directory: Path, rank: int = 4, seed: int = 0, size: float = 0.5, **config: Any) -> Path:
    """An adapter of all linear layers of a model; `rank_pattern` and so on as in adapter_config.json."""
    directory.mkdir(parents=True, exist_ok=True)
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": "all-linear", **config}
    (directory / "adapter_config.json").write_text(json.dumps(settings))
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for module, (rows, columns) in modules_of(base).items():
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
        rank = rank_of(settings, module)
        alpha = settings.get("alpha_pattern", {}).get(last, settings["lora_alpha"])
        scale = alpha / (math.sqrt(rank) if settings.get("use_rslora") else rank)
        weights[f"{module}.weight"] += factors[f"{name}.lora_B.weight"] @ factors[f"{name}.lora_A.weight"] * scale
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    return directory
