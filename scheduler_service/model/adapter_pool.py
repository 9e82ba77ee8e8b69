"""The factors of LoRA adapters in the memory of a device: a fixed number of slots, each with room for one adapter.

For each product that adapters may change there is a tensor of first factors, (slots, parts, rank, in), and for each of
its parts (queries, keys and values have one product, for example) one of second factors, (slots, columns, rank). The
rank is the largest that is allowed. What an adapter has less of it is not read. A product of experts has the factors of
each of them: (slots * experts, ...).

An adapter's tensors stay in the host's memory, page-locked. The device has those that were used last.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import torch

from quartet.kernels.cpu.linear import Linear, no_pause
from quartet.scheduler_service.host.transfer import send
from quartet.scheduler_service.weights.adapters import AdapterTensors, allowed_modules
from quartet.scheduler_service.weights.parameters import Layout, Slab, Weights, kind_of

PLAIN = ("qkv", "output", "gate_up", "down", "router", "shared_gate_up", "shared_down", "shared_gate")
OF_EXPERTS = ("expert_gate_up", "expert_down")  # the last number of a slab's index is the expert's
RANK_MULTIPLE = 16  # a factor's rows are whole vectors

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class ProductShape:
    """One product that adapters may change."""

    slab: Slab  # without the number of the expert
    linear: Linear  # that of the first expert
    parts: list[tuple[int, int]]  # first column, and number of columns
    experts: int = 1

    def factors(self, rank: int) -> list[Shape]:
        """The shapes of an adapter's factors of this rank: a, then b of each part."""
        width, experts = self.linear.weight.shape[1], self.experts
        return [(experts, len(self.parts), rank, width), *((experts, columns, rank) for _, columns in self.parts)]

    def size(self, rank: int) -> int:
        """The numbers in them."""
        return sum(torch.Size(shape).numel() for shape in self.factors(rank))


@dataclass(frozen=True, slots=True, eq=False)
class HostAdapter:
    """One adapter in the host's memory: by product its factors in one run, zeros where it has none or fewer ranks."""

    rank: int  # the largest
    products: dict[Slab, torch.Tensor]


@dataclass(frozen=True, slots=True)
class Part:
    """Neighbouring columns of a product: one weight of the checkpoint."""

    column: int
    first: int  # of its ranks among those of all parts
    b: torch.Tensor  # (slots * experts, columns, rank)


@dataclass(frozen=True, slots=True)
class AdaptedProduct:
    """The factors that adapters have for one product."""

    shape: ProductShape
    a: torch.Tensor  # (slots * experts, parts, rank, in)
    parts: list[Part] = field(default_factory=list)

    @property
    def ranks(self) -> int:
        """Of all parts together."""
        return self.a.shape[1] * self.a.shape[2]


class AdapterPool:
    """All slots, and which adapters they have."""

    def __init__(self, weights: Weights, slots: int, largest_rank: int, modules: Collection[str] | None = None) -> None:
        """Of a model with these weights; memory is taken by `allocate`.

        `modules`: see read_adapter; only their products get memory.
        """
        self.slots = slots
        self.rank = -(-largest_rank // RANK_MULTIPLE) * RANK_MULTIPLE
        self.shapes = shapes_of(weights, modules)
        self._dtype, self._device = weights.dtype, weights.device
        self.slot_of: dict[HostAdapter, int] = {}  # least recently used first
        self.products: dict[Linear, AdaptedProduct] = {}  # by the layer, or that of the first expert

    def allocate(self) -> None:
        """Take the memory, all zeros: what was never written has to be a number all the same.

        Raises torch.OutOfMemoryError.
        """
        memory = torch.zeros(self.nbytes // self._dtype.itemsize, dtype=self._dtype, device=self._device)
        sizes = [shape.size(self.rank) * self.slots for shape in self.shapes.values()]
        for shape, own in zip(self.shapes.values(), memory.split(sizes), strict=True):
            a, *bs = views(own, [(self.slots * experts, *others) for experts, *others in shape.factors(self.rank)])
            parts = [
                Part(column, number * self.rank, b)
                for number, ((column, _), b) in enumerate(zip(shape.parts, bs, strict=True))
            ]
            self.products[shape.linear] = AdaptedProduct(shape, a, parts)

    def release(self) -> None:
        """Give the memory back; nothing may compute with adapters until `allocate`."""
        self.products.clear()
        self.slot_of.clear()

    @property
    def nbytes(self) -> int:
        return self.slots * sum(shape.size(self.rank) for shape in self.shapes.values()) * self._dtype.itemsize

    @property
    def ranks(self) -> list[int]:
        """Of the adapters by slot; 0 where it is free."""
        ranks = [0] * self.slots
        for adapter, slot in self.slot_of.items():
            ranks[slot] = adapter.rank
        return ranks

    @property
    def has_room(self) -> bool:
        """Whether a slot is free."""
        return bool(self.products) and len(self.slot_of) < self.slots

    def packed(self, tensors: AdapterTensors, yield_point: Callable[[], None] = no_pause) -> HostAdapter:
        """An adapter as `place` takes it; safe in another thread. `yield_point` is called now and then.

        All that it changes must have a product here (`lacks`).
        """
        rank = max(len(one.a) for factors in tensors.slabs.values() for one in factors)
        found: dict[Slab, torch.Tensor] = {}
        for slab, factors in tensors.slabs.items():
            of, expert = product_of(slab)
            shape = self.shapes[of]
            if of not in found:
                found[of] = torch.zeros(shape.size(rank), dtype=self._dtype)
            a, *bs = views(found[of], shape.factors(rank))
            numbers = {column: number for number, (column, _) in enumerate(shape.parts)}
            for one in factors:
                number = numbers[one.start]
                a[expert, number, : len(one.a)] = one.a
                bs[number][expert, :, : len(one.a)] = one.b
            yield_point()
        if self._device.type == "cuda":
            found = {slab: pinned(flat, yield_point) for slab, flat in found.items()}
        return HostAdapter(rank, found)

    def lacks(self, tensors: AdapterTensors) -> set[Slab]:
        """The slabs that an adapter changes and that have no product here."""
        return {slab for slab in tensors.slabs if product_of(slab)[0] not in self.shapes}

    def place(self, adapters: Sequence[HostAdapter]) -> list[int]:
        """The slots of different adapters; between two steps.

        Those that have none are written to free slots, then to those that were not used for longest. Raises
        RuntimeError while the memory is given back.
        """
        if not self.products:
            raise RuntimeError("the slots of adapters have no memory")
        assert len(adapters) <= self.slots, (len(adapters), self.slots)
        for adapter in adapters:
            if adapter in self.slot_of:
                self.slot_of[adapter] = self.slot_of.pop(adapter)
        for adapter in adapters:
            if adapter not in self.slot_of:
                slot = self._free_slot(adapters)
                self._write(adapter, slot)
                self.slot_of[adapter] = slot
        return [self.slot_of[adapter] for adapter in adapters]

    def drop(self, adapter: HostAdapter) -> None:
        """Free the slot of an adapter, if it has one. Launched steps come before whatever is written there."""
        self.slot_of.pop(adapter, None)

    def _free_slot(self, kept: Sequence[HostAdapter]) -> int:
        taken = set(self.slot_of.values())
        if len(taken) < self.slots:
            return next(slot for slot in range(self.slots) if slot not in taken)
        return self.slot_of.pop(next(adapter for adapter in self.slot_of if adapter not in kept))

    @torch.inference_mode()
    def _write(self, adapter: HostAdapter, slot: int) -> None:
        """Put an adapter into a slot; nothing is waited for. Where the first factor is zeros, the second is any."""
        rank = adapter.rank
        for product in self.products.values():
            experts = product.shape.experts
            own = slice(slot * experts, (slot + 1) * experts)
            flat = adapter.products.get(product.shape.slab)
            if flat is None:
                product.a[own, :, :rank].zero_()
                continue
            a, *bs = views(send(flat, self._device), product.shape.factors(rank))
            product.a[own, :, :rank].copy_(a)
            for part, b in zip(product.parts, bs, strict=True):
                part.b[own, :, :rank].copy_(b)


def pinned(tensor: torch.Tensor, yield_point: Callable[[], None]) -> torch.Tensor:
    """A copy in page-locked memory."""
    yield_point()
    return tensor.pin_memory()


def views(flat: torch.Tensor, shapes: Sequence[Shape]) -> list[torch.Tensor]:
    """Tensors of these shapes, which lie one behind the other."""
    pieces = flat.split([torch.Size(shape).numel() for shape in shapes])
    return [piece.view(shape) for piece, shape in zip(pieces, shapes, strict=True)]


def product_of(slab: Slab) -> tuple[Slab, int]:
    """The product that a weight belongs to, and the number of its expert, 0 where there are none."""
    buffer, index = slab
    return ((buffer, index[:-1]), index[-1]) if kind_of(buffer) in OF_EXPERTS else (slab, 0)


def shapes_of(weights: Weights, modules: Collection[str] | None) -> dict[Slab, ProductShape]:
    """The products of a model that adapters may change."""
    parts, found = parts_of(weights.layout, modules), dict[Slab, ProductShape]()
    for layer, buffer, index in weights.followers:
        slab, expert = product_of((buffer, index))
        if isinstance(layer, Linear) and expert == 0 and slab in parts:
            experts = weights.layout.buffers[buffer][len(index) - 1] if kind_of(buffer) in OF_EXPERTS else 1
            found[slab] = ProductShape(slab, layer, parts[slab], experts)
    return found


def parts_of(layout: Layout, modules: Collection[str] | None) -> dict[Slab, list[tuple[int, int]]]:
    """The parts of each product that adapters may change."""
    allowed, found = allowed_modules(modules), dict[Slab, list[tuple[int, int]]]()
    for name, place in layout.places.items():
        slab, expert = product_of((place.buffer, place.index))
        known = kind_of(place.buffer) in (*PLAIN, *OF_EXPERTS) and len(place.shape) == 2 and expert == 0
        if known and (allowed is None or name.removesuffix(".weight").rpartition(".")[2] in allowed):
            found.setdefault(slab, []).append((place.start, place.shape[0]))
    return found
