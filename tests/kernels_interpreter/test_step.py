"""A whole decode step from the operations alone, five per layer: the host hands over nothing between two steps."""

from dataclasses import dataclass, field

import torch

from quartet.kernels.operations import Ops
from quartet.kernels.ops import resolve
from quartet.kernels.triton.attention_decode import decode_workspace
from tests.kernels.cases import EPSILON, Maker

LAYERS, HIDDEN, SIZE, VOCAB = 1, 32, 16, 100
HEADS, KV_HEADS, DIM = 2, 1, 16
SLOTS, PAGES, PAGE = 3, 3, 4
LONGEST = PAGES * PAGE
MAKE = Maker(torch.float32, "cpu")


@dataclass(frozen=True, slots=True)
class Layer:
    attention_norm: torch.Tensor = field(default_factory=lambda: MAKE.near_one(HIDDEN))
    qkv: torch.Tensor = field(default_factory=lambda: MAKE.weight((HEADS + 2 * KV_HEADS) * DIM, HIDDEN))
    output: torch.Tensor = field(default_factory=lambda: MAKE.weight(HIDDEN, HEADS * DIM))
    mlp_norm: torch.Tensor = field(default_factory=lambda: MAKE.near_one(HIDDEN))
    gate_up: torch.Tensor = field(default_factory=lambda: MAKE.weight(2 * SIZE, HIDDEN))
    down: torch.Tensor = field(default_factory=lambda: MAKE.weight(HIDDEN, SIZE))


class Model:
    """Weights that both backends share."""

    def __init__(self) -> None:
        self.embedding = MAKE.normal(VOCAB, HIDDEN)
        self.norm = MAKE.near_one(HIDDEN)
        self.layers = [Layer() for _ in range(LAYERS)]
        angles = torch.outer(torch.arange(LONGEST), 0.5 ** torch.arange(DIM // 2))
        cos, sin = angles.cos(), angles.sin()
        self.rotary = torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)), 1)


class Engine:
    """Everything that a captured step would own, at fixed addresses."""

    def __init__(self, ops: Ops, model: Model) -> None:
        self.ops, self.model = ops, model
        self.slots = torch.tensor([2, -1, 0])  # the middle row is padding
        self.rows = len(self.slots)
        self.last_tokens = torch.tensor([5, 6, 7])
        self.next_positions = torch.zeros(SLOTS, dtype=torch.int64)
        self.finished = torch.zeros(SLOTS, dtype=torch.int32)
        self.page_table = torch.tensor([[3, 1, 8], [2, 4, 6], [9, 5, 7]], dtype=torch.int32)
        self.pools = [torch.zeros(2, KV_HEADS, 10 * PAGE, DIM) for _ in range(LAYERS)]
        self.seeds = torch.tensor([11, 0, 13])

    def step(self) -> torch.Tensor:
        """One token more in each slot; the logits that it was drawn from."""
        ops, model, rows = self.ops, self.model, self.rows
        ids, positions, kv_slots = (torch.empty(rows, dtype=torch.int64) for _ in range(3))
        lengths, valid = (torch.empty(rows, dtype=torch.int32) for _ in range(2))
        x, inner = torch.empty(rows, HIDDEN), torch.empty(rows, SIZE)
        cos, sin = (torch.empty(rows, 1, DIM) for _ in range(2))
        q, mixed = (torch.empty(rows, HEADS, DIM) for _ in range(2))
        sizes = decode_workspace(rows, HEADS, KV_HEADS, DIM, LONGEST)
        partials, counters = torch.empty(sizes[0]), torch.zeros(sizes[1], dtype=torch.int32)
        ops.prepare(
            self.slots, self.last_tokens, self.next_positions, self.finished, self.page_table, PAGE,
            model.embedding, 1.0, model.rotary, ids, positions, kv_slots, lengths, x, cos, sin,
        )  # fmt: skip
        for layer, (keys, values) in zip(model.layers, self.pools, strict=True):
            ops.norm_qkv_rope_kv(
                x, layer.attention_norm, EPSILON, False, layer.qkv, None,
                cos, sin, kv_slots, keys, values, q,
            )  # fmt: skip
            ops.paged_decode(
                q, keys, values, self.page_table, self.slots.clamp(min=0), lengths, PAGE, LONGEST,
                DIM**-0.5, None, None, None, partials, counters, mixed,
            )  # fmt: skip
            ops.gemv(mixed.view(rows, -1), layer.output, None, x, x)
            ops.norm_gate_up(x, layer.mlp_norm, EPSILON, False, layer.gate_up, None, "silu", inner)
            ops.gemv(inner, layer.down, None, x, x)
        logits, tops, masses = torch.empty(rows, VOCAB), torch.empty(rows, 2), torch.empty(rows, 2)
        ops.lm_head_sample(
            x, model.norm, EPSILON, False, model.embedding, None, torch.tensor([0.0, 0.0, 0.8]), self.seeds,
            positions, self.slots, logits, tops, masses, torch.zeros(1, dtype=torch.int32), self.last_tokens, valid,
        )  # fmt: skip
        assert valid.all()
        return logits


def test_both_backends_generate_the_same_tokens_step_after_step() -> None:
    model = Model()
    left, right = Engine(resolve("cpu", "torch"), model), Engine(resolve("cpu", "triton"), model)
    for step in range(1, 6):  # across the first page's end
        expected, found = left.step(), right.step()
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert right.last_tokens.tolist() == left.last_tokens.tolist()
        assert right.next_positions.tolist() == [step, 0, step]
        assert right.last_tokens[1] == 6  # no row ran in this slot
