"""A row's result is the same, bit for bit, whatever shares its batch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from quartet.kernels.ops import resolve
from quartet.kernels.triton.skinny import skinny_workspace
from tests.kernels import adapters, attention, dense, moe, recurrent, sampling
from tests.kernels.cases import Arguments, Maker, clone

OPS = resolve("cpu", "triton")
FLOAT = Maker(torch.float32, "cpu")
BY_ROW = {"q", "x", "residual", "lengths", "table_rows", "out", "logits", "tops", "masses", "candidates", "tokens"}
BY_ROW |= {"mixed", "decay", "beta", "steps", "reads", "writes"}
BY_ROW |= {"valid", "temperatures", "seeds", "positions", "top_ks", "top_ps", "min_ps"}


def alone(arguments: Arguments, row: int) -> Arguments:
    """The arguments of one row of a batch."""
    own: dict[str, Any] = clone(arguments)
    return {key: x[row : row + 1].contiguous() if key in BY_ROW and x is not None else x for key, x in own.items()}


def assert_rows_are_independent(op: str, arguments: Arguments, output: str) -> None:
    together = clone(arguments)
    getattr(OPS, op)(**together)
    for row in range(len(together[output])):
        by_itself = alone(arguments, row)
        getattr(OPS, op)(**by_itself)
        assert torch.equal(by_itself[output][0], together[output][row]), row


def test_a_decode_row_does_not_depend_on_the_rows_beside_it() -> None:
    arguments = attention.paged_decode(FLOAT, heads=4, kv_heads=2, dim=16, lengths=[700, 20, 300], table_rows=True)
    assert_rows_are_independent("paged_decode", arguments, "out")


@pytest.mark.parametrize(("tokens", "block"), [(6, None), (16, None), (5, 64), (70, 64)])
def test_a_token_of_a_skinny_product_does_not_depend_on_the_others(tokens: int, block: int | None) -> None:
    arguments = dense.skinny(FLOAT, tokens=tokens, columns=300, rows=70)
    partials = FLOAT.poisoned(skinny_workspace(tokens, 70, 300, False, block)[0])
    assert_rows_are_independent("skinny", {**arguments, "partials": partials, "block": block}, "out")


def test_a_chosen_token_does_not_depend_on_the_other_rows() -> None:
    filters = {"top_ks": [7, 0], "top_ps": [0.8], "min_ps": [0.0]}
    arguments = sampling.select(FLOAT, rows=3, vocab=600, temperatures=[0.9], **filters)
    assert_rows_are_independent("select", arguments, "tokens")


def test_a_tokens_experts_do_not_depend_on_the_other_tokens() -> None:
    arguments = moe.expert_gate_up(FLOAT, tokens=3, hidden=48, experts=5, top_k=2, size=10)
    together = clone(arguments)
    OPS.expert_gate_up(**together)
    for row in range(3):
        by_itself = {**alone(arguments, row), "ids": arguments["ids"][row : row + 1].contiguous()}
        OPS.expert_gate_up(**by_itself)
        assert torch.equal(by_itself["out"][0], together["out"][row])


@pytest.mark.parametrize("op", [adapters.adapter_shrink, adapters.adapter_expand])
def test_what_adapters_add_to_a_token_does_not_depend_on_the_others(op: Callable[..., Arguments]) -> None:
    owners = adapters.OWNERS["long"]
    together = op(FLOAT, owners="long", slots=2, columns=100, rank=20, lowest=20)
    before = clone(together)
    getattr(OPS, op.__name__)(**together)
    for token, slot in enumerate(owners):
        only = adapters.grouped(FLOAT, [-1] * token + [slot] + [-1] * (len(owners) - token - 1), 20, 20)
        by_itself = {**clone(before), **only}
        getattr(OPS, op.__name__)(**by_itself)
        assert torch.equal(by_itself["out"][token], together["out"][token]), token


def test_a_recurrence_of_one_sequence_does_not_depend_on_the_others() -> None:
    shape = {"heads": 4, "key_dim": 24, "value_dim": 40}
    assert_rows_are_independent("convolve_row", recurrent.convolve_row(FLOAT, rows=3, channels=70), "out")
    assert_rows_are_independent("delta_update", recurrent.delta_update(FLOAT, rows=3, key_heads=2, **shape), "out")
    assert_rows_are_independent("space_update", recurrent.space_update(FLOAT, rows=3, groups=2, **shape), "out")
