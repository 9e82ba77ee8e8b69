"""Which weights are quantized, and how a stored tensor becomes such a weight.

`--quantization int8` and `int4` quantize the weights of products (PRODUCTS) when they are read. int8 rotates those of
feed-forward blocks before; int4 has more bits where rounding costs most. With `auto` the blocks of a GGUF file and the
numbers of GPTQ, AWQ and compressed-tensors stay as they are. Where tensors of one slab have different formats, the slab
gets the smallest scheme that holds the values of all (`Scheme.joined`).
"""

import logging
from collections.abc import Callable, Iterator
from dataclasses import astuple, replace
from functools import reduce

import torch
import xxhash

from quartet.kernels.cpu.native import library as native
from quartet.kernels.cpu.native.quantized import (
    FINE_ROTATED_INT8,
    INT4,
    INT6,
    LONG_ROWS_INT8,
    ROTATED_COLUMNS,
    ROTATED_INT8,
    QuantizedRows,
    Scheme,
    step_of,
)
from quartet.runtime.config import WeightScheme
from quartet.runtime.errors import StartupError
from quartet.scheduler_service.weights import file_rows
from quartet.scheduler_service.weights.checkpoint import Checkpoint, CheckpointError, StoredTensor
from quartet.scheduler_service.weights.parameters import Layout, Schemes, Slab, Weights, kind_of
from quartet.scheduler_service.weights.tensor_io import bytes_of, read_chunks, read_rows

log = logging.getLogger(__name__)

BOTH_SIDES = ("embed", "embed_by_layer", "lm_head")  # buffers with a row for each token
PRODUCTS = (
    *BOTH_SIDES,
    "qkv",
    *("query_down", "query", "kv_down"),
    "output",
    *("conv_in", "conv_out", "delta_in", "delta_out", "delta_forget", "delta_gate", "space_in", "space_out"),
    "gate_up",
    "down",
    "expert_gate_up",
    "expert_down",
    "shared_gate_up",
    "shared_down",
    *("layer_gate", "layer_projection", "layer_context"),
    *("beside_left", "beside_right", "stream_in", "stream_out"),
)
CHOICES = ("int8", "int4")
FEED_FORWARD = ("gate_up", "down", "expert_gate_up", "expert_down", "shared_gate_up", "shared_down")
ATTENTION = ("qkv", "query_down", "query", "kv_down", "output")


def schemes_of(
    choice: str, layout: Layout, dtype: torch.dtype, device: torch.device, checkpoint: Checkpoint | None
) -> Schemes:
    """The schemes of a model's weights by --quantization; empty: all are plain. Raises StartupError.

    `checkpoint` is None for random weights.
    """
    if choice == "none":
        return {}
    can = can_quantize(dtype, device)
    if choice in CHOICES:
        if device.type != "cpu":
            raise StartupError(f"--quantization {choice} works on a CPU only; leave it out")
        if not can:
            raise StartupError(f"--quantization {choice} needs bfloat16 activations; add --dtype bfloat16")
        if native.library() is None:
            raise StartupError(
                f"--quantization {choice} needs the kernels that gcc compiles at the first start; leave it out to "
                "serve the model in its own number format"
            )
        stored = {} if checkpoint is None else stored_schemes(layout, checkpoint)
        wanted = {slab: chosen_scheme(choice, slab, layout, stored.get(slab)) for slab in slabs_of(layout)}
    elif can and checkpoint is not None and any(stored_scheme(checkpoint, name) for name in layout.places):
        if native.library() is None:
            return {}
        wanted = stored_schemes(layout, checkpoint)
    else:
        return {}
    return whole_buffers(layout, wanted)


def chosen_scheme(choice: str, slab: Slab, layout: Layout, stored: Scheme | None) -> Scheme:
    """The scheme of a slab by --quantization int8 or int4, where the checkpoint stores it by `stored`.

    Numbers that would be rounded a second time only because scales are bytes stay as they are.
    """
    buffer, _ = slab
    made = int8_scheme(buffer, layout) if choice == "int8" else int4_scheme(buffer)
    wide = replace(made, scale_bits=16)
    return wide if stored is not None and stored.joined(wide) == wide else made


def int8_scheme(buffer: str, layout: Layout) -> Scheme:
    """The scheme of a buffer's slabs by --quantization int8.

    The weights of feed-forward blocks are rotated: they are most of a model, and with AMX or VNNI many rows are
    multiplied with them as integers of 8 bits; with AMX more numbers share a scale, since scaling takes it as long as
    multiplying. Attention and the head would lose more by it: their rows keep 16 bits.
    """
    can_rotate = layout.buffers[buffer][-1] % ROTATED_COLUMNS == 0
    if not can_rotate or kind_of(buffer) not in FEED_FORWARD:
        return LONG_ROWS_INT8
    kernels = native.library()
    return ROTATED_INT8 if kernels is not None and kernels.instruction_set == "amx" else FINE_ROTATED_INT8


def int4_scheme(buffer: str) -> Scheme:
    """The scheme of a buffer's slabs by --quantization int4.

    Rounding attention's weights to 4 bits costs as much as rounding those of feed-forward blocks, which are several
    times as many: attention has more bits. Embeddings and head are a third of a small model.
    """
    return INT6 if kind_of(buffer) in (*ATTENTION, *BOTH_SIDES) else INT4


def can_quantize(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there are kernels for quantized weights."""
    return device.type == "cpu" and dtype is torch.bfloat16


def recorded(schemes: Schemes) -> list[WeightScheme]:
    """Schemes as a record of what serves has them."""
    return [WeightScheme(buffer, index, *astuple(scheme)) for (buffer, index), scheme in schemes.items()]


def schemes_in(schemes: list[WeightScheme]) -> Schemes:
    """The schemes of a record: the reverse of `recorded`."""
    return {
        (f.buffer, f.index): Scheme(f.bits, f.group_size, f.offsets, f.zero_point, f.rotated, f.row_bits, f.scale_bits)
        for f in schemes
    }


def slabs_of(layout: Layout) -> dict[Slab, list[str]]:
    """The slabs that products read, with the names of their tensors."""
    slabs: dict[Slab, list[str]] = {}
    for name, place in layout.places.items():
        if kind_of(place.buffer) in PRODUCTS:
            slabs.setdefault((place.buffer, place.index), []).append(name)
    return slabs


def stored_schemes(layout: Layout, checkpoint: Checkpoint) -> Schemes:
    """The scheme of each slab all of whose tensors are stored quantized."""
    schemes: Schemes = {}
    for slab, names in slabs_of(layout).items():
        known = [scheme for name in names if (scheme := stored_scheme(checkpoint, name)) is not None]
        if len(known) == len(names):
            schemes[slab] = reduce(Scheme.joined, known)
    return schemes


def stored_scheme(checkpoint: Checkpoint, name: str) -> Scheme | None:
    """The scheme that holds a tensor's numbers as they are stored; None where there is none, or no such tensor."""
    if (made := checkpoint.quantized.get(name)) is not None:
        return made.scheme
    stored = checkpoint.tensors.get(name)
    return stored.encoding.scheme if stored is not None and stored.encoding is not None else None


def whole_buffers(layout: Layout, wanted: Schemes) -> Schemes:
    """Those schemes that can be: every slab of a buffer has one, and its tensors begin at whole blocks of rows."""
    plain = {
        slab[0]
        for slab, names in slabs_of(layout).items()
        if slab not in wanted or any(layout.places[name].start % native.BLOCK_COLUMNS for name in names)
    }
    return {slab: scheme for slab, scheme in wanted.items() if slab[0] not in plain}


def log_storage(weights: Weights, choice: str) -> None:
    """Log how the weights are quantized, and which are not."""
    if not weights.schemes:
        return
    quantized = {buffer for buffer, _ in weights.schemes}
    plain = sorted({kind_of(buffer) for buffer, _ in slabs_of(weights.layout) if buffer not in quantized})
    bits = sorted({scheme.bits for scheme in weights.schemes.values()})
    kept = "stay quantized as the file has them," if choice not in CHOICES else "are quantized"
    log.info(
        "Weights %s to %s bits (--quantization %s): %.3f GB of memory.%s",
        kept,
        ", ".join(map(str, bits)),
        choice,
        weights.nbytes() / 1e9,
        f" Not quantized: {', '.join(plain)}." if plain else "",
    )


def read_numbers(
    name: str,
    stored: StoredTensor,
    weights: Weights,
    descriptor: int,
    yield_point: Callable[[], None],
    digest: "xxhash.xxh3_64 | None" = None,
) -> None:
    """Read a tensor to its place in a quantized weight, some rows at a time. Raises CheckpointError.

    QuantizedRows of the file stay as they are where the slab's scheme has room for them, else the values are quantized.
    Those of `Weights.in_file` are looked at, and stay in the file.
    """
    quantized = weights.quantized_of(name)
    assert quantized is not None, name
    scheme = None if stored.encoding is None else stored.encoding.scheme
    if scheme is not None and scheme.joined(quantized.scheme) == quantized.scheme:
        stays = weights.layout.places[name].buffer == weights.in_file and file_rows.are_possible(stored)
        for row, memory, part in stored_numbers(stored, descriptor):
            if digest is not None:
                digest.update(bytes_of(memory))
            joined = part.to(quantized.scheme)
            if not joined.fits():
                raise CheckpointError(f"{stored.shown}: tensor {name} has scales that are too large or not finite")
            if stays:
                yield_point()
            else:
                weights.write(name, joined, row, yield_point)
        if stays:
            quantized.keep_elsewhere(file_rows.FileRows(stored, descriptor))
        return
    with weights.writing(name, yield_point) as values:
        for memory, placed in read_chunks(stored, values, descriptor):
            yield_point()
            if digest is not None:
                digest.update(bytes_of(memory))
            if placed is not None and not bool(torch.isfinite(placed).all()):
                raise CheckpointError(f"tensor {name} holds values that are not finite")


def stored_numbers(stored: StoredTensor, descriptor: int) -> Iterator[tuple[int, torch.Tensor, QuantizedRows]]:
    """(number of the first row, the bytes, the numbers) of some rows at a time, whole blocks of rows."""
    assert stored.encoding is not None and stored.encoding.numbers is not None
    rows, columns = stored.shape
    row_bytes = stored.nbytes // max(1, rows)
    together = max(1, stored.encoding.unit_values // columns)  # rows whose order was changed by the conversion
    step = step_of(columns) // together * together
    if step % native.BLOCK_COLUMNS or not step:
        step = max(1, rows)
    buffer = torch.empty(min(step, rows) * row_bytes, dtype=torch.uint8)
    for first in range(0, rows, step):
        memory = buffer[: min(step, rows - first) * row_bytes]
        read_rows(stored, descriptor, bytes_of(memory), first * row_bytes)
        yield first, memory, stored.encoding.numbers(memory, columns)
