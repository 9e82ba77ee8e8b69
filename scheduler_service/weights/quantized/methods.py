"""Finds the quantized tensors of a checkpoint by the quantization_config of its config.json.

Every tensor's parts are checked against each other before a byte of them is read.
"""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from quartet.runtime.errors import StartupError
from quartet.runtime.model_files.model_info import read_json
from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, Part, Quantized
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.bitsandbytes import STATE, bitsandbytes
from quartet.scheduler_service.weights.quantized.column_index import with_index
from quartet.scheduler_service.weights.quantized.compressed import compressed
from quartet.scheduler_service.weights.quantized.mxfp4 import with_experts
from quartet.scheduler_service.weights.quantized.parts import (
    SCALES,
    WORDS,
    Settings,
    Stored,
    choice,
    float8,
    misfit,
    part_of,
    scaled,
)
from quartet.scheduler_service.weights.quantized.scaled_rows import scheme_of
from quartet.scheduler_service.weights.quantized.stacked import with_stacks
from quartet.scheduler_service.weights.quantized.torchao import NUMBERS, torchao

REFUSED = (
    "{} is quantized by {}, which is not read; serve the unquantized checkpoint, a GGUF file, or one quantized by "
    "awq, gptq, bitsandbytes, compressed-tensors, fp8, mxfp4 or torchao"
)
NOT_NEEDED = (  # scales of activations, and shapes that other parts tell
    ".input_scale", ".output_scale", ".k_scale", ".v_scale", ".input_scale_ub", ".input_zero_point", ".weight_shape",
    ".weight_format",
)  # fmt: skip


def with_quantized(checkpoint: Checkpoint, directory: Path) -> Checkpoint:
    """The checkpoint with its quantized tensors found. Raises CheckpointError for what cannot be read."""
    settings, checkpoint = settings_of(directory), with_stacks(with_experts(checkpoint))
    if not settings:
        return checkpoint
    method = str(settings.get("quant_method", "")).lower()
    if method not in METHODS:
        raise CheckpointError(REFUSED.format(directory, short(method) or "a method without a name"))
    suffixes, find = METHODS[method]
    prefixes = [name.removesuffix(end) for name in checkpoint.tensors for end in suffixes if name.endswith(end)]
    found = {}
    for prefix in prefixes:
        if (tensor := find(prefix, checkpoint.tensors, settings)) is not None:
            found[f"{prefix}.weight"] = tensor
    names = {f"{name.removesuffix('.weight')}.{part}" for name, tensor in found.items() for part in tensor.parts}
    spent = names | {name for name in checkpoint.tensors if name.endswith(NOT_NEEDED)}
    return replace(checkpoint, quantized=checkpoint.quantized | found, spent=checkpoint.spent | spent)


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
    unit = columns // groups, 1
    return {"qzeros": Part(zeros, 1, per, across=0, unit=unit), "scales": Part(scales, 1, across=0, unit=unit)}


def gptq(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """GPTQ in 4 or 8 bits, all layers alike."""
    if settings.get("dynamic"):
        raise CheckpointError("quantization_config: dynamic, bits that differ between layers, is not read")
    bits = choice(settings, "bits", 4, (4, 8))
    added = choice(settings, "checkpoint_format", "gptq", ("gptq", "gptq_v2")) == "gptq"
    words = part_of(tensors, prefix, "qweight", WORDS, 2)
    rows, columns = words.shape[1], words.shape[0] * (32 // bits)
    per = 32 // bits
    parts = {
        "qweight": Part(words, 1, across=0, unit=(per, 1)),
        **columns_first(prefix, tensors, bits, rows, columns),
    }
    groups = parts["scales"].stored.shape[0]
    scheme = None if settings.get("desc_act") is True else scheme_of(bits, columns, groups)
    layout = partial(layouts.gptq, bits=bits, added=int(added))
    made = scaled((rows, columns), parts, layout, per, scheme, math.lcm(per, columns // groups))
    return with_index(made, prefix, "g_idx", tensors, groups)


def awq(prefix: str, tensors: Stored, settings: Settings) -> Quantized:
    """AWQ in 4 bits, in the order of its gemm kernel."""
    choice(settings, "bits", 4, (4,))
    if str(settings.get("version", "gemm")).lower() != "gemm":
        raise CheckpointError(f"quantization_config: version is {short(settings['version'])}; what is read is gemm")
    words = part_of(tensors, prefix, "qweight", WORDS, 2)
    rows, columns = words.shape[1] * 8, words.shape[0]
    parts = {"qweight": Part(words, 1, 8, across=0), **columns_first(prefix, tensors, 4, rows, columns)}

    groups = parts["scales"].stored.shape[0]
    return scaled((rows, columns), parts, layouts.awq, 8, scheme_of(4, columns, groups), columns // groups)


METHODS: dict[str, tuple[tuple[str, ...], Callable[[str, Stored, Settings], Quantized | None]]] = {
    "awq": ((".qweight",), awq),
    "gptq": ((".qweight",), gptq),
    "bitsandbytes": ((STATE + "nf4", STATE + "fp4", ".SCB"), bitsandbytes),
    "compressed-tensors": ((".weight_packed", ".weight"), compressed),
    "fp8": ((".weight",), partial(float8, scale="weight_scale_inv")),
    "torchao": ((f".{NUMBERS}",), torchao),
    "mxfp4": ((), lambda *_: None),  # experts alone, which `with_experts` finds
    "fbgemm_fp8": ((".weight",), partial(float8, scale="weight_scale")),
}
