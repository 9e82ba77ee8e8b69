"""The small operations against plain formulas."""

import math

import pytest
import torch

from quartet.kernels.cpu.linear import Linear
from quartet.kernels.reference import layers as reference


def test_rms_norm_divides_by_the_root_mean_square() -> None:
    x, weight = torch.randn(3, 8), torch.randn(8)
    expected = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * weight
    assert torch.allclose(reference.rms_norm(x, weight, 1e-5), expected, atol=1e-6)
    assert torch.allclose(reference.rms_norm_plus_one(x, weight - 1, 1e-5), expected, atol=1e-6)


def test_rotation_by_position_keeps_lengths_and_depends_on_distance_alone() -> None:
    frequencies = torch.tensor([1.0, 0.1, 0.01])
    q, k = torch.randn(1, 1, 6), torch.randn(1, 1, 6)

    def score(query_at: int, key_at: int) -> torch.Tensor:
        at = torch.tensor([query_at]), torch.tensor([key_at])
        turned = [
            reference.rotate(x, *reference.rotation(p, frequencies, 1.0, torch.float32))
            for x, p in zip((q, k), at, strict=True)
        ]
        assert torch.allclose(turned[0].norm(), q.norm())
        return (turned[0] * turned[1]).sum()

    assert torch.allclose(score(7, 3), score(104, 100), atol=1e-4)
    assert not torch.allclose(score(7, 3), score(7, 4), atol=1e-4)


def test_rotation_pairs_first_and_second_half_and_leaves_the_rest() -> None:
    x = torch.tensor([[[1.0, 2.0, 3.0, 4.0, 5.0]]])
    cos, sin = reference.rotation(torch.tensor([1]), torch.tensor([math.pi / 2, math.pi]), 2.0, torch.float32)
    assert torch.allclose(reference.rotate(x, cos, sin), torch.tensor([[[-6.0, -4.0, 2.0, -8.0, 5.0]]]), atol=1e-5)


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (reference.silu_and_mul, torch.nn.functional.silu),
        (reference.gelu_and_mul, torch.nn.functional.gelu),
        (reference.gelu_tanh_and_mul, lambda x: torch.nn.functional.gelu(x, approximate="tanh")),
    ],
)
def test_gated_activations(function: object, expected: object) -> None:
    x = torch.randn(3, 8)
    assert torch.equal(function(x), expected(x[:, :4]) * x[:, 4:])  # type: ignore[operator]


@pytest.mark.parametrize("renormalize", [False, True])
def test_experts_are_chosen_best_first(renormalize: bool) -> None:
    logits = torch.tensor([[0.0, 3.0, 1.0, 2.0]])
    weights, ids = reference.choose_experts(logits, 2, renormalize)
    shares = logits.softmax(-1)[0, [1, 3]]
    assert ids.tolist() == [[1, 3]]
    assert torch.allclose(weights[0], shares / shares.sum() if renormalize else shares)


@pytest.mark.parametrize("tokens", [1, 2, 37])
def test_mixture_is_the_weighted_sum_of_each_tokens_experts(tokens: int) -> None:
    experts, top_k, hidden, inner = 5, 3, 8, 6
    gate_up = [Linear(torch.randn(2 * inner, hidden)) for _ in range(experts)]
    down = [Linear(torch.randn(hidden, inner)) for _ in range(experts)]
    x = torch.randn(tokens, hidden)
    weights, ids = reference.choose_experts(torch.randn(tokens, experts), top_k, renormalize=True)
    found = reference.run_experts(x, weights, ids, gate_up, down, reference.silu_and_mul)
    for token in range(tokens):
        row = x[token : token + 1]
        outputs = [down[e](reference.silu_and_mul(gate_up[e](row))) for e in ids[token].tolist()]
        expected = sum(w * y for w, y in zip(weights[token], outputs, strict=True))
        assert torch.allclose(found[token], expected[0], atol=1e-4)


def test_attention_with_window_softcap_and_sinks_matches_a_loop() -> None:
    queries, keys, heads, kv_heads, dim, window, cap = 3, 7, 4, 2, 8, 4, 2.0
    q, k, v = torch.randn(queries, heads, dim), torch.randn(keys, kv_heads, dim), torch.randn(keys, kv_heads, dim)
    sinks = torch.randn(heads)
    found = reference.attention(q, k, v, 0.5, window, cap, sinks)
    for row in range(queries):
        at = keys - queries + row
        seen = range(max(0, at - window + 1), at + 1)
        for head in range(heads):
            scores = torch.stack([cap * torch.tanh(0.5 * q[row, head] @ k[j, head // 2] / cap) for j in seen])
            shares = torch.cat((scores, sinks[head : head + 1])).softmax(0)[:-1]
            expected = sum(share * v[j, head // 2] for share, j in zip(shares, seen, strict=True))
            assert torch.allclose(found[row, head], expected, atol=1e-5)
