"""Reads LoRA adapters in peft's format: adapter_config.json with adapter_model.safetensors or adapter_model.bin.

An adapter is untrusted like a checkpoint: names, shapes and ranks are checked against the model before memory is taken,
and values must be finite.
"""

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import re2
import torch

from quartet.runtime.model_files.files import present
from quartet.runtime.shorten import short
from quartet.scheduler_service.host.background import yield_point
from quartet.scheduler_service.weights import pickled, tensor_io
from quartet.scheduler_service.weights.adapter_config import ModuleSettings, read_settings
from quartet.scheduler_service.weights.checkpoint import (
    DTYPES,
    CheckpointError,
    StoredTensor,
    header_of,
    read_headers,
)
from quartet.scheduler_service.weights.cuts import Cut
from quartet.scheduler_service.weights.file_identity import FileIdentity, identity_of
from quartet.scheduler_service.weights.parameters import Layout, Place, Slab, kind_of

SAFETENSORS = "adapter_model.safetensors"
PICKLED = "adapter_model.bin"
ADAPTED = {  # buffers of weights that may have an adapter
    "qkv",
    "output",
    "gate_up",
    "down",
    "router",
    "expert_gate_up",
    "expert_down",
    "shared_gate_up",
    "shared_down",
    "shared_gate",
    *("layer_gate", "layer_projection", "layer_context"),  # of inputs by layer, and of several residual streams
    *("beside_left", "beside_right", "stream_in", "stream_out", "stream_router"),
}
TENSOR_NAME = re2.compile(r"base_model\.model\.(.+)\.lora_([AB])(?:\.default)?\.weight")
ALL_MODULES = ("all", "all-linear")
ENTRY = b'"data_offsets"'  # once in a header's entry of a tensor: within a string its quotes are escaped
ENTRY_NAME = re.compile(rb'"((?:[^"\\]|\\.)*+)"\s*+:\s*+\{')
OTHER_OBJECTS = 1000  # more than what a header says beside its tensors
VALUES_OF_TENSOR, OTHER_VALUES = 16, 50_000  # commas: a tensor's entry has five
SHOWN_NAMES = 3
TOO_MANY = "{} has {} tensors, and adapters of this model have at most {}; the first are {}"
NO_FACTOR = "tensor {} is not a factor (lora_A or lora_B) of a linear layer"
STRAYS = "the model has no linear layers for {} of the adapter's tensors ({}); is the adapter of another model?"


@dataclass(frozen=True, slots=True)
class Factors:
    """What an adapter adds to some rows of one weight: b @ a."""

    start: int  # the first of those rows in its slab
    a: torch.Tensor  # (rank, in)
    b: torch.Tensor  # (rows, rank), times the scale


@dataclass(frozen=True, slots=True)
class AdapterTensors:
    """One adapter, read and checked."""

    rank: int  # the largest
    slabs: dict[Slab, list[Factors]]


def weights_file(directory: Path) -> Path:
    """The file that holds an adapter's tensors. Raises CheckpointError."""
    for name in (SAFETENSORS, PICKLED):
        if present(directory / name):
            return directory / name
    raise CheckpointError(f"{directory} has neither {SAFETENSORS} nor {PICKLED}")


def adapter_identity(directory: Path) -> FileIdentity:
    """What changes when the tensors of an adapter are written again. Raises CheckpointError."""
    return identity_of(weights_file(directory))


def read_adapter(
    directory: Path, layout: Layout, dtype: torch.dtype, max_rank: int, modules: Collection[str] | None = None
) -> AdapterTensors:
    """The adapter of a directory, for weights of this layout, in `dtype`; safe in another thread.

    `modules`: last parts of the names of weights that it may change; None: any. Raises CheckpointError.
    """
    yield_point()  # all of it is for the time between two steps
    config = ModuleSettings(read_settings(directory), yield_point)
    if config.largest_rank > max_rank:
        raise CheckpointError(f"{directory}: rank {config.largest_rank} exceeds --max-lora-rank {max_rank}")
    file = weights_file(directory)
    scratches = pickled.run_converter([file]) if file.name == PICKLED else []
    source = scratches[0].path if scratches else file
    check_count(source, layout, file)
    yield_point()
    stored = read_headers(directory, [(source, file)])
    yield_point()
    pairs = paired(stored)
    check_modules(pairs, layout)
    allowed = allowed_modules(modules)
    places = {module: place_of(module, layout, allowed) for module in pairs}
    for module in places:
        check_shapes(module, pairs[module], layout.whole_shape(f"{module}.weight"), config.rank_of(module))
        yield_point()
    slabs: dict[Slab, list[Factors]] = {}
    for module, place in places.items():
        factors = read_factors(module, pairs[module], place, config, dtype)
        own = own_part(factors, layout.cuts.get(f"{module}.weight"))
        slabs.setdefault((place.buffer, place.index), []).append(own)
        yield_point()
    return AdapterTensors(config.largest_rank, slabs)


def allowed_modules(modules: Collection[str] | None) -> set[str] | None:
    """The last parts of the names of weights that may be changed; None: any."""
    return None if modules is None or set(modules).intersection(ALL_MODULES) else set(modules)


def most_tensors(layout: Layout) -> int:
    """How many tensors an adapter of this model may have."""
    return 2 * sum(len(place.shape) == 2 and kind_of(place.buffer) in ADAPTED for place in layout.places.values())


def check_count(file: Path, layout: Layout, shown: Path | None = None) -> None:
    """Raise CheckpointError for a file with far more tensors than an adapter has, before its header is taken apart.

    Of fewer, each that has no use is told by its name later. Names may be escaped, braces and commas cannot be.
    `shown`: the file's name in the message.
    """
    header, _ = header_of(file)
    most = most_tensors(layout)
    if header.count(b",") > VALUES_OF_TENSOR * most + OTHER_VALUES:
        raise CheckpointError(f"{shown or file}: the header has more values than one of an adapter of this model")
    count = max(header.count(ENTRY), header.count(b"{") - OTHER_OBJECTS)
    if count <= 2 * most:
        return
    names = (found[1].decode(errors="replace") for found in ENTRY_NAME.finditer(header) if found[1] != b"__metadata__")
    raise CheckpointError(TOO_MANY.format(shown or file, count, most, first_of(names)))


def check_announced(names: Sequence[str], shapes: Sequence[Sequence[int]], layout: Layout, max_rank: int) -> None:
    """Raise CheckpointError unless tensors of these names and shapes may be those of an adapter of this model."""
    if len(names) > (most := most_tensors(layout)):
        raise CheckpointError(TOO_MANY.format("names", len(names), most, first_of(names)))
    for name, shape in zip(names, shapes, strict=False):
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(NO_FACTOR.format(short(name)))
        check_modules([match.group(1)], layout)
        rows, columns = layout.whole_shape(f"{match.group(1)}.weight")
        wide = columns if match.group(2) == "A" else rows
        rank_and_width = tuple(shape) if match.group(2) == "A" else tuple(shape)[::-1]
        if len(shape) != 2 or rank_and_width[1] != wide or not 0 < rank_and_width[0] <= max_rank:
            raise CheckpointError(f"tensor {short(name)} has the shape {short(shape)}, which does not fit the model")


def first_of(names: Iterable[str]) -> str:
    """The first of these names, for a message."""
    return ", ".join(short(name) for name, _ in zip(names, range(SHOWN_NAMES), strict=False))


def check_modules(modules: Collection[str], layout: Layout) -> None:
    """Raise CheckpointError where the model lacks layers that the adapter is for."""
    if strays := [module for module in modules if f"{module}.weight" not in layout.places]:
        raise CheckpointError(STRAYS.format(2 * len(strays), first_of(strays)))


Pair = dict[str, StoredTensor]  # "A" and "B"


def paired(stored: dict[str, StoredTensor]) -> dict[str, Pair]:
    """Module → its two factors. Raises CheckpointError for any other tensor, and for one without its partner."""
    pairs: dict[str, Pair] = {}
    for name, tensor in stored.items():
        yield_point()
        match = TENSOR_NAME.fullmatch(name)
        if match is None:
            raise CheckpointError(NO_FACTOR.format(short(name)))
        pair = pairs.setdefault(match.group(1), {})
        if match.group(2) in pair:
            raise CheckpointError(f"tensor {short(name)} is there twice, under two names")
        pair[match.group(2)] = tensor
    if not pairs:
        raise CheckpointError("the adapter has no tensors")
    for module, pair in pairs.items():
        if len(pair) < 2:
            raise CheckpointError(f"{short(module)} has one of lora_A and lora_B only")
    return pairs


def place_of(module: str, layout: Layout, allowed: Collection[str] | None) -> Place:
    """Where the weight of a module lives. Raises CheckpointError for one that cannot be adapted."""
    place = layout.places[f"{module}.weight"]
    if kind_of(place.buffer) not in ADAPTED:
        raise CheckpointError(f"an adapter of {short(module)} is not supported; only layers' linear weights have one")
    if allowed is not None and module.rpartition(".")[2] not in allowed:
        raise CheckpointError(f"{short(module)} is not among --lora-target-modules ({', '.join(sorted(allowed))})")
    return place


def own_part(factors: Factors, cut: Cut | None) -> Factors:
    """What one rank has of an adapter: the part of `b` or `a` that belongs to its part of the weight."""
    if cut is None:
        return factors
    if cut.dimension == 0:
        return replace(factors, b=cut.of(factors.b).contiguous())
    return replace(factors, a=cut.of(factors.a).contiguous())


def check_shapes(module: str, pair: Pair, shape: tuple[int, ...], rank: int) -> None:
    """Raise CheckpointError unless both factors fit the weight, of this shape, and the rank that the settings name."""
    rows, columns = shape
    for letter, expected in (("A", (rank, columns)), ("B", (rows, rank))):
        tensor = pair[letter]
        if tensor.shape != expected:
            raise CheckpointError(
                f"lora_{letter} of {short(module)} has the shape {list(tensor.shape)}, expected {list(expected)}"
            )
        if tensor.dtype not in DTYPES:
            raise CheckpointError(f"lora_{letter} of {short(module)} has the dtype {tensor.dtype}, which is not read")


def read_factors(module: str, pair: Pair, place: Place, config: ModuleSettings, dtype: torch.dtype) -> Factors:
    """Both factors of a module, the scale in the second. Raises CheckpointError."""
    a, b = read_tensor(pair["A"]), read_tensor(pair["B"]) * config.scale_of(module)
    a, b = a.to(dtype), b.to(dtype)
    for letter, values in (("A", a), ("B", b)):
        if not bool(values.isfinite().all()):
            raise CheckpointError(f"lora_{letter} of {short(module)} has values that are not finite in {dtype}")
    return Factors(place.start, a, b)


def read_tensor(stored: StoredTensor) -> torch.Tensor:
    """The values as float32."""
    target = torch.empty(stored.shape, dtype=torch.float32)
    with tensor_io.open_file(stored.file) as descriptor:
        for _ in tensor_io.read_chunks(stored, target, descriptor):
            yield_point()
    return target
