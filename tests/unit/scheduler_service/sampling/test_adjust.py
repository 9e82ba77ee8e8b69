"""Penalties, minimum length: what concerns single tokens, before the draw."""

import torch

from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.sampling.state import make_row
from tests.unit.scheduler_service.sampling.test_choose import EOS, adjust, sample, sequence


def test_penalties_count_the_output_and_not_the_prompt():
    logits = torch.zeros(2, 10)
    logits[:, 7] = 1.0  # the prompt's token
    params = SamplingParams(temperature=0.0, presence_penalty=2.0)
    assert sample(logits, [sequence(params), sequence(params, output=[7])]) == [7, 0]


def test_penalties_are_the_same_counted_one_by_one_or_from_the_token_list():
    params = SamplingParams(frequency_penalty=0.3, repetition_penalty=1.2)
    output = [1, 2, 2, 9, 1]
    grown, rebuilt = make_row(sequence(params), []), make_row(sequence(params, output), [])
    for token in output:
        grown.add(token)
    logits = torch.randn(1, 12)
    left, right = logits.clone(), logits.clone()
    adjust(left, [grown], [10])
    adjust(right, [rebuilt], [10])
    assert torch.equal(left, right)


def test_the_end_is_masked_until_the_minimum_is_reached():
    logits = torch.zeros(2, 10)
    logits[:, EOS], logits[:, 8] = 5.0, 4.0
    params = SamplingParams(temperature=0.0, min_new_tokens=2, stop_token_ids=[8])
    assert sample(logits, [sequence(params, [1]), sequence(params, [1, 1])]) == [0, EOS]
