"""From a plan to flat arrays."""

from array import array

import torch

from quartet.runtime.messages import Request
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.plan import Plan, Slice
from quartet.scheduler_service.core.request import Sequence
from quartet.scheduler_service.execution.inputs import Inputs, PageRuns, add_embeds, add_token_types, make_inputs

PAGE = 4


def sequence(ids: range, pages: list[int], **fields: bytes) -> Sequence:
    made = Sequence(Request(rid="r", params=SamplingParams()), array("i", ids), len(ids), **fields)
    made.pages = pages
    return made


def inputs(*slices: Slice, last_tokens: list[int] | None = None) -> Inputs:
    runs = [PageRuns().of(share.sequence) for share in slices]
    return make_inputs(Plan(list(slices)), runs, last_tokens or [0] * len(slices), PAGE)


def test_decode_rows_and_chunks_lie_side_by_side():
    row, chunk = sequence(range(100, 106), [7, 3]), sequence(range(200, 211), [5, 6, 9])
    found = inputs(Slice(row, 5, 6, True), Slice(chunk, 2, 10, False))
    assert found.input_ids.tolist() == [105, *range(202, 210)]
    assert found.positions.tolist() == [5, *range(2, 10)]
    assert found.placement.slots.tolist() == [3 * PAGE + 1, *range(22, 28), 36, 37]
    assert found.offsets == found.starts.tolist() == [0, 1, 9]
    assert found.ragged.query_lengths == [1, 8] and found.ragged.context_lengths == [6, 10]
    assert found.ragged.runs == [[(7, 1), (3, 1)], [(5, 2), (9, 1)]]
    assert found.input_ids.dtype == found.positions.dtype == found.placement.slots.dtype == torch.int64


def test_a_token_that_is_not_committed_is_the_one_sampled_last():
    found = inputs(Slice(sequence(range(4), [1, 2]), 4, 5, True), last_tokens=[77])
    assert found.input_ids.tolist() == [77]


def begun(start: int, end: int) -> list[int]:
    found = inputs(Slice(sequence(range(12), [7, 8, 9]), start, end, False)).placement.begun
    return [] if found is None else found.tolist()


def test_pages_begun_and_not_filled_are_named():
    assert begun(0, 3) == [7]
    assert begun(0, 4) == []
    assert begun(2, 4) == []
    assert begun(2, 6) == [8]
    assert begun(4, 5) == [8]
    assert begun(5, 6) == []
    assert begun(3, 12) == []


def test_runs_follow_a_growing_list_of_pages():
    runs, growing = PageRuns(), sequence(range(12), [4, 5])
    assert runs.of(growing) == [(4, 2)]
    growing.pages.append(6)
    assert runs.of(growing) == [(4, 3)]
    growing.pages.append(2)
    assert runs.of(growing) == [(4, 3), (2, 1)]


def test_a_new_list_of_pages_is_a_new_admission():
    runs, moved = PageRuns(), sequence(range(12), [4, 5])
    runs.of(moved)
    moved.pages = [4, 9]
    assert runs.of(moved) == [(4, 1), (9, 1)]


def test_embeds_stand_where_the_prompt_brought_them_and_nowhere_else():
    own = torch.arange(12.0).view(6, 2)
    prompt = sequence(range(6), [1, 2], embeds=own.numpy().tobytes())
    plan = Plan([Slice(sequence(range(3), [5]), 2, 3, True), Slice(prompt, 2, 6, True)])
    found = inputs(*plan.slices)
    add_embeds(found, plan, hidden_size=2)
    assert found.embeds_mask.tolist() == [False, True, True, True, True]
    assert torch.equal(found.embeds[1:], own[2:])


def test_sampled_tokens_of_an_embeds_request_are_ordinary():
    prompt = sequence(range(7), [1, 2], embeds=torch.ones(6, 2).numpy().tobytes())
    plan = Plan([Slice(prompt, 6, 7, True)])
    found = inputs(*plan.slices)
    add_embeds(found, plan, hidden_size=2)
    assert found.embeds_mask.tolist() == [False]


def test_token_types_are_zero_for_those_who_have_none():
    typed = sequence(range(3), [1], token_types=array("i", [0, 1, 1]).tobytes())
    plan = Plan([Slice(sequence(range(3), [5]), 0, 3, True), Slice(typed, 1, 3, True)])
    found = inputs(*plan.slices)
    add_token_types(found, plan)
    assert found.token_types.tolist() == [0, 0, 0, 1, 1]
