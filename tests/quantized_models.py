"""Small random models, quantized in every form that is read."""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from quartet.runtime.model_files import gguf_directory
from tests import checkpoints, gguf_files
from tests.unit.scheduler_service.weights.quantized import (
    test_bitsandbytes,
    test_compressed,
    test_methods,
    test_torchao,
)

GROUP32 = {"num_bits": 4, "type": "int", "strategy": "group", "group_size": 32}
COMPRESSED: dict[str, tuple[str, dict[str, Any]]] = {
    "packed": ("pack-quantized", GROUP32),
    "packed with zero points": ("pack-quantized", {**GROUP32, "symmetric": False}),
    "int8 by row": ("int-quantized", {"num_bits": 8, "type": "int", "strategy": "channel"}),
    "fp8 by block": ("float-quantized", test_compressed.BLOCKS),
}
WHOLE_BLOCKS = {"hidden_size": 256, "intermediate_size": 768}  # rows of blocks of 256


def methods(method: str, directory: Path, seed: int) -> Path:
    test_methods.write(directory, method, seed)
    return directory


def with_index(act_order: bool, directory: Path, seed: int) -> Path:
    """GPTQ with an index of columns, in order or by activation."""
    test_methods.write(directory, "gptq", seed)
    file, generator = directory / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(file)
    for name in [name for name in tensors if name.endswith(".scales")]:
        prefix, columns = name.removesuffix(".scales"), 8 * len(tensors[name.replace("scales", "qweight")])
        index = torch.arange(columns, dtype=torch.int32) // (columns // len(tensors[name]))
        order = torch.randperm(columns, generator=generator) if act_order else torch.arange(columns)
        tensors[f"{prefix}.g_idx"] = index[order]
    save_file(tensors, file)
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["desc_act"] = act_order
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def compressed(kind: str, directory: Path, seed: int) -> Path:
    form, settings = COMPRESSED[kind]
    torch.manual_seed(seed)
    groups = {"group_0": test_compressed.group(settings)}
    test_compressed.write(directory, form, groups, {"_proj.weight": (form, settings)})
    return directory


def bitsandbytes(form: str, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    test_bitsandbytes.write(directory, form)
    return directory


def torchao(kind: str, directory: Path, seed: int) -> Path:
    torch.manual_seed(seed)
    test_torchao.write(directory, kind)
    return directory


def gguf(type: int, directory: Path, seed: int, **sizes: Any) -> Path:
    """A model as a GGUF file; the directory that describes it."""
    original = checkpoints.random_model(directory / "original", seed, **sizes)
    torch.manual_seed(seed)
    file = gguf_files.convert(original, directory / "model.gguf", type)
    return gguf_directory.described(file, directory, tokenizer=False)


KINDS: dict[str, Callable[[Path, int], Path]] = {  # (directory, seed) → where the model is
    **{method: partial(methods, method) for method in test_methods.SETTINGS},
    "gptq with an index": partial(with_index, False),
    "gptq by activation": partial(with_index, True),
    **{kind: partial(compressed, kind) for kind in COMPRESSED},
    **{f"bitsandbytes {form}": partial(bitsandbytes, form) for form in ("plain", "nested", "int8")},
    **{kind: partial(torchao, kind) for kind in test_torchao.KINDS},
    "Q8_0": partial(gguf, gguf_files.Q8_0),
    "Q4_K": partial(gguf, gguf_files.Q4_K, **WHOLE_BLOCKS),
    "Q6_K": partial(gguf, gguf_files.Q6_K, **WHOLE_BLOCKS),
}
