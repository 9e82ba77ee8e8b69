"""LoRA adapters that an encoder has for tasks: each text of a step may have another one, or none.

They are part of the model: their factors lie among its weights and change with them. What they add to products is
computed as for adapters of decoders (kernels/cpu/adapters.py); what they add to embeddings is computed here.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from quartet.kernels.cpu.adapters import AdapterWeights, Factors, Slab, StepAdapters, attach
from quartet.kernels.cpu.linear import no_pause
from quartet.scheduler_service.model.encoder_spec import EncoderSpec, Product, TaskSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights

BESIDE = "parametrizations.weight.0.lora_{}"
TABLES = ("words", "types")  # that adapters change
FACTORS = ("a", "b")
BASE = -1  # in place of the number of a task


def add_tasks(layout: Layout, spec: EncoderSpec, tasks: TaskSpec) -> None:
    """Places for the factors: `a` and `b` of each table and product, those of all tasks in one slab.

    As (tasks, parts, rank, columns) and (tasks, rows, rank) they lie in memory, of tables as `of_table` reads them.
    """
    hidden, count, rank = spec.hidden_size, len(tasks.tasks), tasks.rank
    for buffer, name, rows in spec.tables:
        if buffer not in TABLES:
            continue
        if tasks.folders:
            inside = [f"{folder}.base_model.model.{name}.lora_embedding_" for folder in tasks.folders]
            layout.add(f"{buffer}_task_a", (), [(f"{start}A", rank) for start in inside], rows)
            layout.add(f"{buffer}_task_b", (), [(f"{start}B", hidden) for start in inside], rank)
            continue
        beside = f"{spec.prefix}{name}.{BESIDE}"
        layout.add(f"{buffer}_task_a", (), [(beside.format("A"), count)], (rows, rank))
        layout.add(f"{buffer}_task_b", (), [(beside.format("B"), count)], (rank, hidden))
    for layer in range(len(spec.layers)):
        for product in spec.products(tasks.names if tasks.folders else spec.names):
            add_product(layout, spec, tasks, layer, product)


def add_product(layout: Layout, spec: EncoderSpec, tasks: TaskSpec, layer: int, product: Product) -> None:
    """Places for the factors of a product of a layer."""
    count, rank = len(tasks.tasks), tasks.rank
    a, b = f"{product.buffer}_task_a", f"{product.buffer}_task_b"
    if not tasks.folders:
        [tensor] = product.tensors
        beside = f"{spec.prefix}{spec.names.layer.format(layer)}{tensor}.{BESIDE}"
        layout.add(a, (layer,), [(beside.format("A"), count)], (rank, product.columns))
        layout.add(b, (layer,), [(beside.format("B"), count)], (sum(product.rows), rank))
        return
    starts = [f"{folder}.base_model.model.{tasks.names.layer.format(layer)}" for folder in tasks.folders]
    parts = list(zip(product.tensors, product.rows, strict=True))
    down = [(f"{start}{tensor}.lora_A.weight", rank) for start in starts for tensor, _ in parts]
    layout.add(a, (layer,), down, product.columns)
    up = [(f"{start}{tensor}.lora_B.weight", rows) for start in starts for tensor, rows in parts]
    layout.add(b, (layer,), up, rank)


class TaskAdapters:
    """The adapters of a model, and which rows of a step have which.

    It is told of new values as layers are (see weights.parameters.Packs), and keeps no copy that `Weights` would hold.
    """

    packed: tuple[torch.Tensor, ...] | None = None
    packed_bytes = 0

    def __init__(self, spec: EncoderSpec, tasks: TaskSpec, weights: Weights) -> None:
        self.spec = spec
        self.tasks = tasks
        self.weights = weights
        self.numbers = {task: number for number, task in enumerate(tasks.tasks)}
        self.products = spec.products(tasks.names if tasks.folders else spec.names)
        self.step: StepAdapters | None = None
        self.made: list[AdapterWeights] = []  # by task; none: they are made for the next step that needs them
        tables = [(buffer, ()) for buffer, _, _ in spec.tables if buffer in TABLES]
        layers = [(product.buffer, (layer,)) for product in self.products for layer in range(len(spec.layers))]
        for slab, index in (*tables, *layers):
            for factor in FACTORS:
                weights.follow(self, f"{slab}_task_{factor}", index)

    def pack(self, weight: torch.Tensor, yield_point: Callable[[], None] = no_pause) -> None:
        """Nothing is made ahead: all adapters together are small."""

    def adopt(self, packed: tuple[torch.Tensor, ...] | None) -> None:
        """The values have changed."""
        self.made = []

    def attach(self) -> None:
        """Have the layers add what adapters have for them; once, when the weights are loaded."""
        buffers = {product.buffer for product in self.products}
        self.step = attach([follower for follower in self.weights.followers if follower[1] in buffers])

    def owners(self, tasks: Sequence[str], starts: torch.Tensor) -> torch.Tensor:
        """(tokens,) int64: the number of each token's task, or BASE; of texts with these tasks ("": none)."""
        numbers = torch.tensor([self.numbers[task] if task else BASE for task in tasks], device=starts.device)
        return numbers.repeat_interleave(starts.diff())

    @contextmanager
    def of_rows(self, owners: torch.Tensor) -> Iterator[None]:
        """Within it products add what the adapters of their rows have; `owners` (rows,), see `owners`."""
        assert self.step is not None, "attach comes first"
        if not self.made:
            self.made = [self.step.weights(self.factors(number)) for number in range(len(self.tasks.tasks))]
        with self.step.of_step(self.made, owners):
            yield

    def factors(self, number: int) -> dict[Slab, list[Factors]]:
        """What one adapter has for each product."""
        found: dict[Slab, list[Factors]] = {}
        for product in self.products:
            rows = product.rows if len(product.tensors) == len(product.rows) else (sum(product.rows),)
            for layer in range(len(self.spec.layers)):
                a, b = self.pair(product.buffer, layer)
                downs = a.reshape(len(self.tasks.tasks), len(rows), self.tasks.rank, product.columns)[number]
                ups = self.scaled(b.reshape(len(self.tasks.tasks), sum(rows), self.tasks.rank)[number]).split(rows)
                starts = [sum(rows[:part]) for part in range(len(rows))]
                found[product.buffer, (layer,)] = list(zip(starts, downs, ups, strict=True))
        return found

    def pair(self, buffer: str, *index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.weights.slab(f"{buffer}_task_a", *index), self.weights.slab(f"{buffer}_task_b", *index)

    def scaled(self, b: torch.Tensor) -> torch.Tensor:
        return (b.float() * self.tasks.scale).to(b.dtype)

    def of_table(self, buffer: str, ids: torch.Tensor, owners: torch.Tensor) -> torch.Tensor:
        """What adapters add to rows of a table: (tokens, hidden) for ids (tokens,) of tokens with these owners."""
        a, b = self.pair(buffer)
        added = torch.zeros(len(ids), self.spec.hidden_size, dtype=b.dtype, device=b.device)
        for number in self.numbers.values():
            rows = (owners == number).nonzero().flatten()
            if len(rows):
                added[rows] = self.of_ids(a, b, number, ids[rows])
        return added

    def of_ids(self, a: torch.Tensor, b: torch.Tensor, number: int, ids: torch.Tensor) -> torch.Tensor:
        """The same of one adapter."""
        if not self.tasks.folders:
            return a[number][ids] @ self.scaled(b[number])
        count, rank = len(self.tasks.tasks), self.tasks.rank
        downs, ups = a.view(count, rank, -1)[number], b.view(count, -1, rank)[number]  # (rank, vocab), (hidden, rank)
        return downs[:, ids].T @ self.scaled(ups).T
