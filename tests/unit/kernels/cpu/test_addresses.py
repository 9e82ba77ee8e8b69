"""Whoever moves what structures of C code point to counts it, and the layers then follow."""

import pytest
import torch

from quartet.kernels.cpu import addresses
from quartet.kernels.cpu.linear import Linear
from quartet.kernels.cpu.native import build
from quartet.kernels.cpu.native.quantized import INT8, QuantizedWeight
from quartet.scheduler_service.execution.kv_cache import KVCache
from quartet.scheduler_service.model.batch import AttentionSpec
from quartet.scheduler_service.weights.parameters import Layout, Weights
from tests import checkpoints
from tests.engine import ALL_LOGPROBS, Engine

CPU = torch.device("cpu")
PROMPT = list(range(10, 31))


def weights() -> Weights:
    layout = Layout()
    layout.add("norm", (), [("norm", 32)], None)
    made = Weights(layout, torch.bfloat16, CPU)
    made.slab("norm")
    return made


def blocks() -> QuantizedWeight:
    return QuantizedWeight(16, 32, INT8)


def pools() -> KVCache:
    return KVCache([AttentionSpec(0, 2, 1, 32, 1.0)], 4, 16, torch.bfloat16, CPU)


MOVES = {  # what is made before, and what is done with it
    "weights exchanged": ((weights, weights), lambda own, other: own.take_over(other, {"norm"}, [])),
    "weights given back": ((weights,), Weights.release),
    "weights taken again": ((weights,), Weights.allocate),
    "a slab lent": ((weights,), lambda own: own.lend(torch.empty(32, dtype=torch.bfloat16), "norm")),
    "blocks exchanged": ((blocks, blocks), QuantizedWeight.exchange),
    "blocks given back": ((blocks,), QuantizedWeight.release),
    "blocks kept elsewhere": ((blocks,), lambda own: own.keep_elsewhere(lambda rows: rows)),
    "a weight packed again": ((lambda: Linear(torch.zeros(16, 32), None),), lambda own: own.adopt(None)),
    "pools taken again": ((pools,), KVCache.allocate),
    "pools given back": ((pools,), KVCache.release),
}


@pytest.mark.parametrize(("made", "move"), MOVES.values(), ids=MOVES)
def test_a_move_is_counted(made, move):
    objects = [make() for make in made]
    before = addresses.moves()
    move(*objects)
    assert addresses.moves() > before


@pytest.mark.parametrize("make", [weights, blocks])
def test_what_is_new_has_not_moved(make):
    """So weights that are read for an update cost the steps beside them nothing."""
    before = addresses.moves()
    make()
    assert addresses.moves() == before


@pytest.mark.skipif(not build.is_possible(), reason="no compiler, or another kind of machine")
def test_norms_that_move_alone_are_followed(tmp_path):
    directory = checkpoints.random_model(tmp_path, 0)
    served, fresh = (Engine(directory, dtype="bfloat16", disable_radix_cache=True) for _ in range(2))
    own, other = (engine.worker.model.weights for engine in (served, fresh))
    names = {name for name, place in own.layout.places.items() if "norm" in place.buffer}
    staged = own.staging()
    staged.fill_random(seed=7)
    for name in names:
        other.view(name).copy_(staged.view(name))
    before = scores(served)
    own.take_over(staged, names, [])
    after = scores(served)
    assert after != before
    assert after == scores(fresh)


def scores(engine: Engine) -> list[float]:
    rid = engine.add(PROMPT, logprobs=ALL_LOGPROBS)
    engine.run()
    return engine.answers[rid].logprobs.values
