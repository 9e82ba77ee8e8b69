"""Reads what the compressed-tensors library writes: integers packed in words, int8 and FP8, as vLLM serves them.

`quantization_config` has groups of settings, each with its targets; a module belongs to the group that names it, or
else to the one that names its class. Settings of activations say how other servers round them; here they stay as they
are.
"""

import math
from dataclasses import replace
from functools import partial

import re2

from quartet.runtime.shorten import short
from quartet.scheduler_service.weights.checkpoint import CheckpointError, Part, Quantized, StoredTensor
from quartet.scheduler_service.weights.quantized import layouts
from quartet.scheduler_service.weights.quantized.column_index import with_index
from quartet.scheduler_service.weights.quantized.parts import (
    FLOAT8,
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

FORMATS = ("pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision", "dense")
PATTERN = "re:"  # in front of a target that is a regular expression
MAX_GROUPS = 64
QUIETLY = re2.Options()
QUIETLY.log_errors = False


def compressed(prefix: str, tensors: Stored, settings: Settings) -> Quantized | None:
    """A matrix in any form that is read; None for a weight that is not quantized. Raises CheckpointError."""
    packed = f"{prefix}.weight_packed" in tensors
    if not packed and tensors[f"{prefix}.weight"].dtype not in (*FLOAT8, "I8"):
        return None
    own = weight_settings(prefix, settings)
    if packed:
        return packed_words(prefix, tensors, own)
    if tensors[f"{prefix}.weight"].dtype == "I8":
        return int8(prefix, tensors)
    if own.get("strategy") == "block":
        own = {"weight_block_size": own.get("block_structure")}
        return float8(prefix, tensors, own, "weight_scale")
    return float8(prefix, tensors, {}, "weight_scale")


def weight_settings(prefix: str, settings: Settings) -> Settings:
    """The settings of a module's weight. Raises CheckpointError where there are none, or none that are read."""
    choice(settings, "format", "pack-quantized", FORMATS)
    sparse = settings.get("sparsity_config")
    if isinstance(sparse, dict) and sparse.get("format", "dense") != "dense":
        raise CheckpointError(f"quantization_config: sparsity_config is {short(sparse)}; sparse weights are not read")
    if settings.get("transform_config"):
        raise CheckpointError("quantization_config: transform_config, weights in another basis, is not read")
    groups = settings.get("config_groups")
    if not isinstance(groups, dict) or not 0 < len(groups) <= MAX_GROUPS:
        raise CheckpointError(f"quantization_config: config_groups is {short(groups)}, which names no settings")
    found = best_group(prefix, list(groups.values()))
    weights = found.get("weights") if isinstance(found, dict) else None
    if not isinstance(weights, dict):
        raise CheckpointError(f"quantization_config: no group of config_groups has settings for {short(prefix)}.weight")
    if isinstance(found, dict) and found.get("format") is not None:
        choice(found, "format", "pack-quantized", FORMATS)
    return weights


def best_group(prefix: str, groups: list[object]) -> object:
    """The group that names the module, or else matches its name, or else is the first that names a class."""
    ranked = []
    for group in groups:
        targets = group.get("targets") if isinstance(group, dict) else None
        for target in targets if isinstance(targets, list) else []:
            rank = rank_of(prefix, target)
            if rank is not None:
                ranked.append((rank, group))
    return min(ranked, key=lambda pair: pair[0], default=(0, None))[1]


def rank_of(prefix: str, target: object) -> int | None:
    """How exactly a target names a module, 0 the best; None where it names another one. Raises CheckpointError."""
    if not isinstance(target, str):
        return None
    if target.startswith(PATTERN):
        try:
            return 1 if re2.match(target.removeprefix(PATTERN), prefix, QUIETLY) else None
        except (re2.error, UnicodeEncodeError) as error:
            raise CheckpointError(
                f"quantization_config: the target {short(target)} is no pattern: {short(error)}"
            ) from error
    if prefix == target:
        return 0
    return None if "." in target else 2  # names of classes have no dots


def packed_words(prefix: str, tensors: Stored, own: Settings) -> Quantized:
    """Integers of 4 or 8 bits, packed along the columns; zero points are packed along the rows."""
    choice(own, "type", "int", ("int",))
    bits = choice(own, "num_bits", 4, (4, 8))
    strategy = choice(own, "strategy", "group", ("group", "channel", "tensor"))
    words = part_of(tensors, prefix, "weight_packed", WORDS, 2)
    per = 32 // bits
    rows, columns = words.shape[0], words.shape[1] * per
    scales = scales_of(tensors, prefix, rows, columns)
    if strategy == "group":
        size = own.get("group_size")
        if type(size) is not int or size * scales.shape[-1] > columns or size * scales.shape[-1] <= columns - per:
            raise CheckpointError(
                f"{scales.shown}: {short(prefix)}: {scales.shape[-1]} scales for {columns} columns, and "
                f"quantization_config says group_size {short(size)}"
            )
        columns = size * scales.shape[-1]
    parts = {
        "weight_packed": Part(words, 0, across=1, unit=(per, 1)),
        "weight_scale": rows_of(scales, rows, columns),
    }
    if own.get("symmetric", True) is not True:
        zeros = part_of(tensors, prefix, "weight_zero_point", WORDS, 2)
        needed = [-(-rows // per), scales.shape[-1]]
        if list(zeros.shape) != needed:
            raise misfit(zeros, prefix, "weight_zero_point", needed)
        parts["weight_zero_point"] = replace(rows_of(zeros, rows, columns), axis=0, per=per)

    groups, zero_point = groups_of(scales), None if "weight_zero_point" in parts else 1 << bits - 1
    scheme = None if f"{prefix}.weight_g_idx" in tensors else scheme_of(bits, columns, groups, zero_point)
    layout = partial(layouts.packed_words, bits=bits, columns=columns)
    unit_columns = 0 if columns % per else math.lcm(per, unit_of(columns, groups))
    made = scaled((rows, columns), parts, layout, per, scheme, unit_columns)
    return with_index(made, prefix, "weight_g_idx", tensors, groups)


def int8(prefix: str, tensors: Stored) -> Quantized:
    """Whole bytes with a sign, and a scale for all, for each row or for groups of columns."""
    weight = part_of(tensors, prefix, "weight", ("I8",), 2)
    rows, columns = weight.shape
    scales = scales_of(tensors, prefix, rows, columns)
    parts = {"weight": Part(weight, 0, across=1), "weight_scale": rows_of(scales, rows, columns)}
    if f"{prefix}.weight_zero_point" in tensors:
        zeros = part_of(tensors, prefix, "weight_zero_point", ("I8",), len(scales.shape))
        if zeros.shape != scales.shape:
            raise misfit(zeros, prefix, "weight_zero_point", list(scales.shape))
        parts["weight_zero_point"] = rows_of(zeros, rows, columns)

    groups, zero_point = groups_of(scales), None if "weight_zero_point" in parts else 128
    scheme = scheme_of(8, columns, groups, zero_point)
    return scaled((rows, columns), parts, layouts.int8, 1, scheme, unit_of(columns, groups))


def scales_of(tensors: Stored, prefix: str, rows: int, columns: int) -> StoredTensor:
    """weight_scale: one number, one a row, or equally many a row. Raises CheckpointError."""
    name = f"{prefix}.weight_scale"
    rank = len(tensors[name].shape) if name in tensors else 2
    scales = part_of(tensors, prefix, "weight_scale", SCALES, min(rank, 2))
    one = all(size == 1 for size in scales.shape)
    if not one and (scales.shape[0] != rows or columns < scales.shape[-1]):
        raise misfit(scales, prefix, "weight_scale", [rows, 1])
    return scales


def groups_of(scales: StoredTensor) -> int:
    """Into how many groups a row's columns are divided."""
    return scales.shape[1] if len(scales.shape) == 2 else 1


def unit_of(columns: int, groups: int) -> int:
    """Of how many columns' multiples some can be read by themselves; 0: rows are read whole."""
    if groups == 1:
        return 1
    return 0 if columns % groups else columns // groups


def rows_of(stored: StoredTensor, rows: int, columns: int) -> Part:
    """A part with one number for all rows, or one for each, or one for each group of a row's columns."""
    one, groups = all(size == 1 for size in stored.shape), groups_of(stored)
    part = Part(stored, None if one and rows > 1 else 0)
    return part if groups == 1 or columns % groups else replace(part, across=1, unit=(columns // groups, 1))
