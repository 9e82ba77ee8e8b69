"""Finds the quantized tensors of a checkpoint by the quantization_config of its config.json.

Every tensor's parts are checked against each other before a byte of them is read.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import read_json
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, Part, Quantized, StoredTensor
from quartet.scheduler_service.weights.quantized import layouts

Settings = Mapping[str, Any]
Stored = Mapping[str, StoredTensor]
REFUSED = (
    "{} is quantized by {}, which is not read; serve the unquantized checkpoint, a GGUF file, or one quantized by "
    "awq, gptq or fp8"
)
ACTIVATIONS = (".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_scale_ub")
WORDS = ("I32",)
SCALES = ("F16", "BF16", "F32")
MAX_BLOCK = 1 << 20
FLOAT8 = ("F8_E4M3", "F8_E5M2")


def with_quantized(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The checkpoint with its quantized tensors found. Raises CheckpointError for what cannot be read."""
    settings = settings_of(directory)
    if not settings:
        return checkpoint
    method = str(settings.get("quant_method", "")).lower()
    if method not in METHODS:
        raise CheckpointError(REFUSED.format(directory, short(method) or "a method without a name"))
    suffix, find = METHODS[method]
    prefixes = [name.removesuffix(suffix) for name in checkpoint.tensors if name.endswith(suffix)]
    found = {}
    for prefix in prefixes:
        if (tensor := find(prefix, checkpoint.tensors, settings)) is not None:
            found[f"{prefix}.weight"] = tensor
    names = {f"{name.removesuffix('.weight')}.{part}" for name, tensor in found.items() for part in tensor.parts}
    spent = names | {name for name in checkpoint.tensors if name.endswith(ACTIVATIONS)}
    return replace(checkpoint, quantized=found, spent=frozenset(spent))


def settings_of(directory: Path) -> Settings:
    """What config.json says of the quantization; empty where it says nothing. Raises CheckpointError."""
    try:
        config = read_json(directory / "config.json")
    except StartupError as error:
        raise CheckpointError(str(error)) from error
    text = config.get("text_config")
    found = config.get("quantization_config") or (text.get("quantization_config") if isinstance(text, dict) else None)
    if found is not None and not isinstance(found, dict):
        raise CheckpointError(f"{directory / 'config.json'}: quantization_config is {short(found)}, not an object")
    return found or {}


def part_of(tensors: Stored, prefix: str, own: str, dtypes: Iterable[str], rank: int) -> StoredTensor:
    """A part that must be there. Raises CheckpointError, naming it, also for a dtype or a rank that cannot be."""
    name = f"{prefix}.{own}"
    if (stored := tensors.get(name)) is None:
        raise CheckpointError(f"the checkpoint lacks {short(name)}, a part of the quantized {short(prefix)}.weight")
    if stored.dtype not in dtypes or len(stored.shape) != rank or not all(stored.shape):
        raise CheckpointError(
            f"{stored.shown}: tensor {short(name)} is {stored.dtype} {list(stored.shape)}, which cannot be"
        )
    return stored


def choice(settings: Settings, name: str, default: Any, allowed: tuple[Any, ...]) -> Any:
    """A setting with one of the values that are read. Raises CheckpointError."""
    value = settings.get(name, default)
    if type(value) is not type(allowed[0]) or value not in allowed:
        said = ", ".join(map(repr, allowed))
        raise CheckpointError(f"quantization_config: {name} is {short(repr(value))}; what is read is {said}")
    return value


def misfit(stored: StoredTensor, prefix: str, own: str, needed: list[int]) -> CheckpointError:
    return CheckpointError(
        f"{stored.shown}: tensor {short(prefix)}.{own} has shape {list(stored.shape)}, its other parts need {needed}"
    )


def columns_first(prefix: str, tensors: Stored, bits: int, rows: int, columns: int) -> dict[str, Part]:
    """The parts that GPTQ and AWQ have in common, checked: zero points and scales by group. Raises CheckpointError."""
    zeros, scales = part_of(tensors, prefix, "qzeros", WORDS, 2), part_of(tensors, prefix, "scales", SCALES, 2)
    groups, per = scales.shape[0], 32 // bits
    if columns % groups or rows % per:
        raise CheckpointError(f"{scales.shown}: {short(prefix)}: {columns} columns cannot form {groups} equal groups")
    if scales.shape != (groups, rows):
        raise misfit(scales, prefix, "scales", [groups, rows])
    if zeros.shape != (groups, rows // per):
        raise misfit(zeros, prefix, "qzeros", [groups, rows // per])
    return {"qzeros": Part(zeros, 1, per), "scales": Part(scales, 1)}


def gptq(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """GPTQ in 4 or 8 bits, all layers alike."""
    if settings.get("dynamic"):
        raise CheckpointError("quantization_config: dynamic, bits that differ between layers, is not read")
    bits = choice(settings, "bits", 4, (4, 8))
    added = choice(settings, "checkpoint_format", "gptq", ("gptq", "gptq_v2")) == "gptq"
    words = part_of(tensors, prefix, "qweight", WORDS, 2)
    rows, columns = words.shape[1], words.shape[0] * (32 // bits)
    parts = {"qweight": Part(words, 1), **columns_first(prefix, tensors, bits, rows, columns)}
    if f"{prefix}.g_idx" in tensors:
        index = part_of(tensors, prefix, "g_idx", WORDS, 1)
        if index.shape != (columns,):
            raise misfit(index, prefix, "g_idx", [columns])
        parts["g_idx"] = Part(index, None)

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return layouts.gptq(read, bits, int(added)).values()

    return Quantized((rows, columns), parts, expand, 32 // bits)


def awq(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """AWQ in 4 bits, in the order of its gemm kernel."""
    choice(settings, "bits", 4, (4,))
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(f"quantization_config: version is {short(settings['version'])}; what is read is gemm")
    words = part_of(tensors, prefix, "qweight", WORDS, 2)
    rows, columns = words.shape[1] * 8, words.shape[0]
    parts = {"qweight": Part(words, 1, 8), **columns_first(prefix, tensors, 4, rows, columns)}

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return layouts.awq(read).values()

    return Quantized((rows, columns), parts, expand, 8)


def float8(prefix: str, tensors: Stored, settings: Settings, scale: str) -> Quantized | None:
    """FP8 with a scale for all, for each row or for each block; None for a weight that is not FP8."""
    weight = tensors[f"{prefix}.weight"]
    if weight.dtype not in FLOAT8:
        return None
    weight = part_of(tensors, prefix, "weight", FLOAT8, 2)
    rows, columns = weight.shape
    block = settings.get("weight_block_size")
    own = scale if f"{prefix}.{scale}" in tensors else "weight_scale_inv"
    rank = len(tensors[f"{prefix}.{own}"].shape) if f"{prefix}.{own}" in tensors else 0
    stored = part_of(tensors, prefix, own, SCALES, min(rank, 2))
    shape = (rows, columns)
    if block:
        if (
            not isinstance(block, list)
            or len(block) != 2
            or not all(type(size) is int and 0 < size < MAX_BLOCK for size in block)
        ):
            raise CheckpointError(f"quantization_config: weight_block_size is {short(block)}; it must be two sizes")
        needed = [-(-rows // block[0]), -(-columns // block[1])]
        if list(stored.shape) != needed:
            raise misfit(stored, prefix, own, needed)
        blocks = {"weight": Part(weight, 0), own: Part(stored, 0, block[0])}
        return Quantized(shape, blocks, partial(block_values, scale=own, block=(block[0], block[1])))
    one = all(size == 1 for size in stored.shape)
    if not one and stored.shape not in ((rows,), (rows, 1)):
        raise misfit(stored, prefix, own, [rows, 1])

    def expand(read: dict[str, torch.Tensor], first: int) -> torch.Tensor:
        return layouts.float8(read, own)

    return Quantized(shape, {"weight": Part(weight, 0), own: Part(stored, None if one else 0)}, expand)


def block_values(read: dict[str, torch.Tensor], first: int, scale: str, block: tuple[int, int]) -> torch.Tensor:
    return layouts.float8_blocks(read, scale, block, first % block[0])


METHODS: dict[str, tuple[str, Callable[[str, Stored, Settings], Quantized | None]]] = {
    "awq": (".qweight", awq),
    "gptq": (".qweight", gptq),
    "fp8": (".weight", partial(float8, scale="weight_scale_inv")),
    "fbgemm_fp8": (".weight", partial(float8, scale="weight_scale")),
}
