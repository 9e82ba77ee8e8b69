"""Slots of adapters: which have one, and what is in it."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch

from quartet.scheduler_service.model.adapter_pool import AdapterPool, HostAdapter
from quartet.scheduler_service.model.decoder import Decoder
from quartet.scheduler_service.weights.adapters import AdapterTensors, read_adapter
from tests.adapters import write_adapter
from tests.engine import Engine
from tests.model import tiny

SLOTS, RANK = 3, 20


class Adapters:
    """A tiny model, its pool, and adapters for it."""

    def __init__(self, directory: Path, modules: list[str] | None = None) -> None:
        self.directory = directory
        self.base = tiny.build("qwen2", directory / "base", num_hidden_layers=2)
        model = Engine(self.base).worker.model
        assert isinstance(model, Decoder)
        self.weights = model.weights
        self.pool = AdapterPool(self.weights, SLOTS, RANK, modules)
        self.pool.allocate()

    def make(self, seed: int, **settings: Any) -> HostAdapter:
        write_adapter(self.base, self.directory / str(seed), seed=seed, **settings)
        return self.pool.packed(self.read(seed))

    def read(self, seed: int) -> AdapterTensors:
        return read_adapter(self.directory / str(seed), self.weights.layout, torch.float32, RANK)


@pytest.fixture
def adapters(tmp_path: Path) -> Adapters:
    return Adapters(tmp_path)


def test_a_slot_has_the_factors_of_each_part_and_zeros_where_the_adapter_has_none(adapters):
    pool, big = adapters.pool, adapters.make(1, rank=20)
    for slot in range(SLOTS):
        pool.place([adapters.make(9 + slot, rank=20)])  # something to be overwritten
    one = adapters.make(2, rank=6, rank_pattern={"k_proj": 3}, without="v_proj")
    [slot] = pool.place([one])
    assert pool.ranks[slot] == 6 and pool.rank == 32
    factors = {factors.start: factors for factors in adapters.read(2).slabs["qkv", (1,)]}
    product = next(product for product in pool.products.values() if product.shape.slab == ("qkv", (1,)))
    query, key, value = product.parts
    for number, (part, rank) in enumerate([(query, 6), (key, 3)]):
        own = factors[part.column]
        assert product.a[slot, number, :rank].equal(own.a) and not product.a[slot, number, rank:6].any()
        assert part.b[slot, :, :rank].equal(own.b)
    assert value.column not in factors and not product.a[slot, 2, :6].any()
    pool.place([big])
    assert pool.ranks[pool.slot_of[big]] == 20


def test_the_adapter_that_was_not_used_for_longest_gives_its_slot(adapters):
    pool, dice = adapters.pool, random.Random(0)
    known = [HostAdapter(rank, {}) for rank in range(1, 8)]
    recent: list[HostAdapter] = []
    for _ in range(500):
        if dice.random() < 0.2:
            gone = dice.choice(known)
            pool.drop(gone)
            recent = [one for one in recent if one is not gone]
        wanted = dice.sample(known, dice.randint(1, SLOTS))
        before = dict(pool.slot_of)
        slots = pool.place(wanted)
        assert len(set(slots)) == len(wanted) and [pool.ranks[slot] for slot in slots] == [one.rank for one in wanted]
        assert all(before[one] == slot for one, slot in zip(wanted, slots, strict=True) if one in before)
        others = [one for one in recent if one not in wanted]
        held, new = ([one for one in wanted if (one in before) is there] for there in (True, False))
        recent = [*others[max(0, len(others) + len(wanted) - SLOTS) :], *held, *new]
        assert set(pool.slot_of) == set(recent)


def test_only_weights_that_adapters_may_change_have_memory(tmp_path):
    every, some = Adapters(tmp_path / "every"), Adapters(tmp_path / "some", ["q_proj", "down_proj"])
    assert {product.shape.slab[0] for product in every.pool.products.values()} == {"qkv", "output", "gate_up", "down"}
    assert {product.shape.slab[0] for product in some.pool.products.values()} == {"qkv", "down"}
    assert all(len(product.parts) == 1 for product in some.pool.products.values())
    taken = sum(p.a.nbytes + sum(part.b.nbytes for part in p.parts) for p in some.pool.products.values())
    assert some.pool.nbytes == taken < every.pool.nbytes


def test_memory_that_was_given_back_comes_back_empty(adapters):
    pool, one = adapters.pool, adapters.make(1)
    pool.place([one])
    pool.release()
    assert not pool.has_room and not pool.products
    with pytest.raises(RuntimeError, match="have no memory"):
        pool.place([one])
    pool.allocate()
    assert pool.has_room and pool.ranks == [0] * SLOTS
    assert pool.place([one]) == [0] and any(product.a.any() for product in pool.products.values())
