"""Recurrent operations: chunks of tokens give what single tokens give."""

import pytest
import torch

from quartet.kernels.reference.recurrent import (
    causal_convolution,
    gated_delta_rule,
    gated_delta_rule_by_chunks,
    state_space,
    state_space_by_chunks,
)


def test_a_convolution_goes_on_where_it_was_cut_with_the_same_bits() -> None:
    x, weight, bias = torch.randn(2, 9, 5), torch.randn(5, 3), torch.randn(5)
    whole, end = causal_convolution(x, torch.zeros(2, 2, 5), weight, bias)
    first, state = causal_convolution(x[:, :1], torch.zeros(2, 2, 5), weight, bias)
    rest, state = causal_convolution(x[:, 1:], state, weight, bias)
    assert torch.equal(torch.cat((first, rest), dim=1), whole)
    assert torch.equal(state, end) and torch.equal(end, x[:, -2:])
    expected = torch.nn.functional.conv1d(x.mT, weight.unsqueeze(1), bias, padding=2, groups=5)[..., :9].mT
    torch.testing.assert_close(whole, expected)


@pytest.mark.parametrize("channels", [1, 8])
@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_the_delta_rule_by_chunks_is_the_one_by_tokens(tokens: int, channels: int) -> None:
    torch.manual_seed(tokens)
    query, key, value = (torch.randn(2, tokens, 3, size) for size in (8, 8, 4))
    decay, beta = -torch.rand(2, tokens, 3, channels), torch.rand(2, tokens, 3)
    state = torch.randn(2, 3, 8, 4)
    by_token, end = gated_delta_rule(query, key, value, decay, beta, state)
    by_chunk, chunk_end = gated_delta_rule_by_chunks(query, key, value, decay, beta, state, chunk=16)
    torch.testing.assert_close(by_chunk, by_token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunk_end, end, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [1, 16, 37])
def test_the_state_space_by_chunks_is_the_one_by_tokens(tokens: int) -> None:
    torch.manual_seed(tokens)
    value, key, query = (torch.randn(2, tokens, 3, size) for size in (4, 8, 8))
    decay, state = -torch.rand(2, tokens, 3), torch.randn(2, 3, 8, 4)
    by_token, end = state_space(value, key, query, decay, state)
    by_chunk, chunk_end = state_space_by_chunks(value, key, query, decay, state, chunk=16)
    torch.testing.assert_close(by_chunk, by_token, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(chunk_end, end, rtol=1e-4, atol=1e-5)


def test_the_state_space_goes_on_where_it_was_cut_with_the_same_bits() -> None:
    value, key, query = (torch.randn(2, 9, 3, size) for size in (4, 8, 8))
    decay, state = -torch.rand(2, 9, 3), torch.randn(2, 3, 8, 4)
    whole, end = state_space(value, key, query, decay, state)
    first, state = state_space(value[:, :4], key[:, :4], query[:, :4], decay[:, :4], state)
    rest, state = state_space(value[:, 4:], key[:, 4:], query[:, 4:], decay[:, 4:], state)
    assert torch.equal(torch.cat((first, rest), dim=1), whole) and torch.equal(state, end)
