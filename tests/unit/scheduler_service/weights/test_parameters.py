"""Flat buffers: pointers that stay, staging copies, layers that follow, checksums."""

import torch
import xxhash

from quartet.kernels.cpu.linear import Linear
from quartet.scheduler_service.weights.parameters import Layout, Weights

CPU = torch.device("cpu")


def two_experts() -> Weights:
    layout = Layout()
    for expert in range(2):
        layout.add("gate_up", (0, expert), [(f"{expert}.gate", 4), (f"{expert}.up", 4)], 8)
    layout.add("bias", (0,), [("bias", 8)], None)
    weights = Weights(layout, torch.float32, CPU)
    weights.fill_random(seed=1)
    return weights


def pointers(weights: Weights) -> list[int]:
    return [buffer.data_ptr() for buffer in weights.buffers.values()]


def test_names_tell_shape_and_dtype_and_views_share_memory() -> None:
    weights = two_experts()
    assert weights.buffers["gate_up"].shape == (1, 2, 8, 8)
    assert weights.names()["1.up"] == ((4, 8), torch.float32)
    weights.view("1.up").fill_(7)
    assert (weights.slab("gate_up", 0, 1)[4:] == 7).all()
    assert (weights.slab("gate_up", 0, 1)[:4] != 7).all()
    assert weights.nbytes() == (2 * 8 * 8 + 8) * 4


def test_swap_keeps_pointers_and_takes_every_value() -> None:
    live = two_experts()
    before = pointers(live)
    staged = live.staging()
    staged.fill_random(seed=2)
    assert set(pointers(staged)).isdisjoint(before)
    live.copy_from(staged)
    assert pointers(live) == before
    assert all(live.checksum(name) == staged.checksum(name) for name in live.names())


def test_layers_follow_a_swap_and_not_the_staging() -> None:
    live = two_experts()
    layer = Linear(live.slab("gate_up", 0, 1), live.slab("bias", 0))
    live.follow(layer, "gate_up", (0, 1))
    live.after_update()
    staged = live.staging()
    staged.fill_random(seed=3)
    x = torch.randn(3, 8)
    old = layer(x)
    packed = live.pack(staged)
    assert torch.equal(layer(x), old)
    live.copy_from(staged, packed)
    expected = torch.nn.functional.linear(x, staged.slab("gate_up", 0, 1), staged.slab("bias", 0))
    assert (layer(x) - expected).abs().max() <= 1e-6
    assert not torch.equal(layer(x), old)


def test_checksum_is_xxh3_of_the_tensors_bytes() -> None:
    weights = two_experts()
    expected = xxhash.xxh3_64_hexdigest(weights.view("0.up").clone().numpy().tobytes())
    assert weights.checksum("0.up") == expected
    weights.view("0.up")[0, 0] += 1
    assert weights.checksum("0.up") != expected
