"""A model's parameters: a few flat buffers, and checkpoint names as views into them.

Loading, in-place update, atomic swap and checksums all follow from that: a second `Weights` of the same layout is
filled while the first one serves, and `take_over` puts it in place between two steps. On a GPU that is one copy per
buffer, and pointers never change; on a CPU the two exchange their memory, and every slab that was handed out follows.

On a CPU the slabs of a buffer may be quantized (`Schemes`). Such a buffer has no memory of its own: its tensor is on
the device "meta", `view` gives a copy of the values, and `write` and `writing` set them.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

import torch
import xxhash

from quartet.kernels.cpu import addresses
from quartet.kernels.cpu.linear import no_pause
from quartet.kernels.cpu.native.quantized import QuantizedRows, QuantizedWeight, Scheme, misfit, quantize
from quartet.scheduler_service.host.parallel import ALONE, Parallel
from quartet.scheduler_service.weights.checkpoint import CheckpointError
from quartet.scheduler_service.weights.cuts import Cut

META = torch.device("meta")

Rows = int | tuple[int, ...]  # of a tensor; several: of the matrices that are one tensor, see Place.sections
Slab = tuple[str, tuple[int, ...]]  # a buffer, and the index of one slab of it
Schemes = dict[Slab, Scheme]  # of the quantized slabs; of a buffer all or none


def kind_of(buffer: str) -> str:
    """What the slabs of a buffer are for; behind a colon stands in which layers, where those differ in shape."""
    return buffer.partition(":")[0]


@dataclass(frozen=True, slots=True)
class Place:
    """Where a checkpoint's tensor lives: some rows of one slab of a buffer."""

    buffer: str
    index: tuple[int, ...]  # of the slab: (layer,) or (layer, expert)
    start: int  # first row
    shape: tuple[int, ...]  # as the checkpoint has it
    sections: tuple[int, ...] = ()  # rows of several matrices that are one tensor; ranks have a part of each; (): one


@dataclass(slots=True)
class Layout:
    """The shapes of the buffers, and the place of every tensor of a checkpoint by name."""

    buffers: dict[str, tuple[int, ...]] = field(default_factory=dict)
    places: dict[str, Place] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)  # of buffers that do not have the model's
    ignored: frozenset[str] = frozenset()  # names that a checkpoint may hold though nothing reads them
    ties: dict[str, str] = field(default_factory=dict)  # name without a place → the name whose values it has
    parallel: Parallel = ALONE  # the ranks that have a part each
    cuts: dict[str, Cut] = field(default_factory=dict)  # of the tensors of which this rank has a part
    cut_buffers: dict[str, int] = field(default_factory=dict)  # buffers of such tensors → the dimension that is cut

    def add(
        self,
        buffer: str,
        index: tuple[int, ...],
        tensors: Sequence[tuple[str, Rows]],
        columns: int | tuple[int, ...] | None,
    ) -> None:
        """Put tensors, each (name, rows), one below the other into one slab; without columns they are vectors."""
        width = columns if isinstance(columns, tuple) else () if columns is None else (columns,)
        start = 0
        for name, rows in tensors:
            assert name not in self.places, name
            sections = rows if isinstance(rows, tuple) else ()
            count = sum(rows) if isinstance(rows, tuple) else rows
            self.places[name] = Place(buffer, index, start, (count, *width), sections)
            start += count
        slabs = tuple(i + 1 for i in index)
        known = self.buffers.get(buffer, (*slabs, start, *width))
        assert known[len(index) :] == (start, *width), (buffer, known, tensors)
        self.buffers[buffer] = (*map(max, slabs, known), start, *width)

    def whole_shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor in the checkpoint, of which this rank may have a part."""
        cut = self.cuts.get(name)
        return self.places[name].shape if cut is None else cut.whole

    def own_part(self, name: str, values: torch.Tensor) -> torch.Tensor:
        """This rank's part of a whole tensor."""
        cut = self.cuts.get(name)
        return values if cut is None else cut.of(values)


class Packs(Protocol):
    """A layer that computes with a copy of its weight in another form."""

    packed: tuple[torch.Tensor, ...] | None  # that form of the present values

    @property
    def packed_bytes(self) -> int:
        """What that form takes."""
        ...

    def pack(self, weight: torch.Tensor, yield_point: Callable[[], None]) -> tuple[torch.Tensor, ...] | None:
        """The other form of new values; the layer goes on with the old ones. Calls `yield_point` now and then."""
        ...

    def adopt(self, packed: tuple[torch.Tensor, ...] | None) -> None:
        """Compute with these from now on."""
        ...


Packed = list[tuple[Packs, tuple[torch.Tensor, ...] | None]]
Follower = tuple[Packs, str, tuple[int, ...]]  # a layer, and the buffer and index of the slab that it computes with


class Weights:
    """The buffers of one layout on one device, and the layers that pack parts of them."""

    def __init__(
        self,
        layout: Layout,
        dtype: torch.dtype,
        device: torch.device,
        schemes: Schemes | None = None,
        in_file: str | None = None,
    ) -> None:
        """`in_file`: a quantized buffer that only gives rows, and whose rows stay in the file where they can."""
        self.in_file = in_file
        self.layout = layout
        self.dtype = dtype
        self.device = device
        self.schemes = schemes or {}
        quantized = {buffer for buffer, _ in self.schemes}
        self.buffers = {
            name: torch.empty(shape, dtype=layout.dtypes.get(name, dtype), device=META if name in quantized else device)
            for name, shape in layout.buffers.items()
        }
        self.quantized = {
            (buffer, index): QuantizedWeight(layout.buffers[buffer][-2], layout.buffers[buffer][-1], scheme)
            for (buffer, index), scheme in self.schemes.items()
        }
        self.followers: list[Follower] = []
        self._slabs: dict[tuple[str, tuple[int, ...]], torch.Tensor] = {}
        self._lent: list[tuple[torch.Tensor, str, tuple[int, ...]]] = []

    def release(self) -> None:
        """Free all memory; nothing may compute until `allocate`."""
        for layer, _, _ in self.followers:
            layer.adopt(None)
        for quantized in self.quantized.values():
            quantized.release()
        if self.device.type == "cpu":  # a storage that numpy has shared cannot be resized
            self._replace_buffers(lambda buffer: buffer.new_empty(1).expand(buffer.shape))
            return
        for buffer in self.buffers.values():
            buffer.untyped_storage().resize_(0)

    def allocate(self) -> None:
        """Take memory again, at other addresses and with undefined contents; call `after_update` once it is filled."""
        for quantized in self.quantized.values():
            quantized.allocate()
        if self.device.type == "cpu":
            self._replace_buffers(lambda buffer: buffer.new_empty(buffer.shape))
            return
        for buffer in self.buffers.values():
            buffer.untyped_storage().resize_(buffer.nbytes)

    def _replace_buffers(self, new: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.buffers = {name: new(buffer) for name, buffer in self.buffers.items()}
        for tensor, buffer, index in self._lent:
            tensor.data = self.buffers[buffer][index]
        addresses.moved()

    def slab(self, buffer: str, *index: int) -> torch.Tensor:
        """One layer's (or expert's) part of a buffer, all fused tensors together; always the same tensor object."""
        slab = self._slabs.get((buffer, index))
        if slab is None:
            # detached: a view would keep its first buffer for ever, also when it has got the memory of another one
            slab = self._slabs[buffer, index] = self.buffers[buffer][index].detach()
            self._lent.append((slab, buffer, index))
        return slab

    def quantized_slab(self, buffer: str, *index: int) -> QuantizedWeight | None:
        """The same where it is quantized; always the same object."""
        return self.quantized.get((buffer, index))

    def quantized_of(self, name: str) -> QuantizedWeight | None:
        """The quantized slab that has the tensor of a name."""
        place = self.layout.places[name]
        return self.quantized.get((place.buffer, place.index))

    def lend(self, tensor: torch.Tensor, buffer: str, *index: int) -> None:
        """Have a tensor made elsewhere share a slab's memory from now on, as if `slab` had returned it."""
        tensor.data = self.buffers[buffer][index]
        self._lent.append((tensor, buffer, index))
        addresses.moved()

    def view(self, name: str) -> torch.Tensor:
        """The tensor of a checkpoint name, in the checkpoint's shape. Raises KeyError for an unknown name.

        Of a quantized slab: a copy of the values.
        """
        place = self.layout.places[name]
        if (quantized := self.quantized_of(name)) is not None:
            return quantized.values(place.start, place.shape[0])
        slab = self.slab(place.buffer, *place.index)
        return slab.narrow(0, place.start, place.shape[0]) if place.shape else slab

    @contextmanager
    def writing(self, name: str, yield_point: Callable[[], None] = no_pause) -> Iterator[torch.Tensor]:
        """A tensor to fill with the values of a name, in the served dtype; they are in their place afterwards.

        Raises CheckpointError for values that cannot be quantized.
        """
        quantized = self.quantized_of(name)
        if quantized is None:
            yield self.view(name)
            return
        values = torch.empty(self.layout.places[name].shape, dtype=self.dtype)
        yield values
        numbers = quantize(values, quantized.scheme)
        if reason := misfit(values, numbers):
            raise CheckpointError(f"tensor {name} cannot be kept in {quantized.scheme.bits} bits: {reason}")
        self.write(name, numbers, 0, yield_point)

    def write(self, name: str, part: QuantizedRows, row: int, yield_point: Callable[[], None] = no_pause) -> None:
        """Set some rows of a tensor of a quantized slab, from row number `row` of it."""
        quantized = self.quantized_of(name)
        assert quantized is not None, name
        quantized.write(self.layout.places[name].start + row, part, yield_point)

    def names(self) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Checkpoint name → shape and dtype."""
        places = self.layout.places.items()
        return {name: (place.shape, self.buffers[place.buffer].dtype) for name, place in places}

    def nbytes(self) -> int:
        plain = sum(buffer.nbytes for buffer in self.buffers.values() if not buffer.is_meta)
        return plain + sum(quantized.nbytes for quantized in self.quantized.values())

    def served_bytes(self) -> int:
        """What these weights take while they serve: the buffers and the packed forms."""
        return self.nbytes() + sum(layer.packed_bytes for layer, _, _ in self.followers)

    def staging(self, device: torch.device | None = None) -> "Weights":
        """Buffers of the same layout with undefined contents, to be filled while these serve."""
        return Weights(self.layout, self.dtype, device or self.device, self.schemes, self.in_file)

    def follow(self, layer: Packs, buffer: str, index: tuple[int, ...]) -> None:
        """From now on `layer` gets a new packed form when the values of a slab have changed."""
        self.followers.append((layer, buffer, index))

    def pack(
        self, staged: "Weights", names: Collection[str] | None = None, yield_point: Callable[[], None] = no_pause
    ) -> Packed:
        """The packed forms of staged values (of `names` only), made before the swap; safe in another thread."""
        followers = self.followers_of(names)
        return [(layer, layer.pack(staged.slab(buffer, *index), yield_point)) for layer, buffer, index in followers]

    def packed_sizes(self, names: Collection[str] | None = None) -> list[int]:
        """Bytes of each tensor that `pack` makes, if it was done before."""
        blocks = (block for layer, _, _ in self.followers_of(names) for block in layer.packed or ())
        return [block.numel() * block.dtype.itemsize for block in blocks]

    def followers_of(self, names: Collection[str] | None) -> list[Follower]:
        """The layers that pack one of these tensors; None: all layers."""
        places = self.layout.places
        changed = {(places[name].buffer, places[name].index) for name in (places if names is None else names)}
        return [follower for follower in self.followers if follower[1:] in changed]

    def take_over(self, staged: "Weights", names: Collection[str], packed: Packed) -> Packed:
        """Serve the staged values of `names`, between two steps only. Returns the packed forms that were used so far.

        `staged` must hold whole buffers: where `names` covers a part of one, it has this one's values in the rest.
        """
        if self.device.type == "cpu" == staged.device.type:
            self._exchange(staged, {self.layout.places[name].buffer for name in names})
        else:
            self._copy(staged, names)
        before = [(layer, layer.packed) for layer, _ in packed]
        self.after_update(packed)
        return before

    def _copy(self, staged: "Weights", names: Collection[str]) -> None:
        """Copy whole buffers where all of their tensors are named, else tensor by tensor; asynchronous on a GPU."""
        places = self.layout.places
        partly = {place.buffer for name, place in places.items() if name not in names}
        for buffer in {places[name].buffer for name in names} - partly:
            self.buffers[buffer].copy_(staged.buffers[buffer], non_blocking=True)
        for name in names:
            if places[name].buffer in partly:
                self.view(name).copy_(staged.view(name), non_blocking=True)

    def _exchange(self, other: "Weights", buffers: Collection[str]) -> None:
        """Exchange the memory of some buffers with another `Weights` of the same layout."""
        for name in buffers:
            self.buffers[name], other.buffers[name] = other.buffers[name], self.buffers[name]
        for (buffer, index), quantized in self.quantized.items():
            if buffer in buffers:
                quantized.exchange(other.quantized[buffer, index])
        for weights in (self, other):
            for tensor, buffer, index in weights._lent:
                if buffer in buffers:
                    tensor.data = weights.buffers[buffer][index]
        addresses.moved()

    def copy_from(self, staged: "Weights", packed: Packed | None = None) -> None:
        """Copy all values, one copy per buffer; addresses stay. Between two steps only."""
        for name in self.buffers:
            self.copy_buffer(staged, name)
        self.after_update(packed)

    def copy_buffer(self, other: "Weights", buffer: str) -> None:
        """Copy the values of one buffer from weights of the same layout and schemes."""
        self.buffers[buffer].copy_(other.buffers[buffer])
        for slab, quantized in self.quantized.items():
            if slab[0] == buffer:
                quantized.copy_from(other.quantized[slab])

    def after_update(self, packed: Packed | None = None) -> None:
        """Call once values have changed; `packed` is what `pack` made of the same values, if it was called."""
        for layer, form in self.pack(self) if packed is None else packed:
            layer.adopt(form)

    def fill_random(self, seed: int) -> None:
        """Normal(0, 0.02), the same for the same seed and layout on every device and rank."""
        generator = torch.Generator().manual_seed(seed)
        for name in self.layout.places:
            with self.writing(name) as view:
                values = torch.empty(self.layout.whole_shape(name)).normal_(0.0, 0.02, generator=generator)
                view.copy_(self.layout.own_part(name, values))

    def checksum(self, name: str) -> str:
        """xxh3 (64 bits, hex) of a tensor's bytes in the served dtype."""
        return checksum_of(self.view(name))


def checksum_of(values: torch.Tensor) -> str:
    """xxh3 (64 bits, hex) of a tensor's bytes."""
    return xxhash.xxh3_64_hexdigest(values.contiguous().cpu().view(torch.uint8).numpy().data)
