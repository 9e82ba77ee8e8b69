"""Logprobs against log_softmax, and their packing."""

from array import array

import torch

from quartet.runtime.messages import LogprobOptions, Logprobs, unpack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution import logprobs as module
from quartet.scheduler_service.execution.logprobs import log_of_sums, output_logprobs, prompt_logprobs
from quartet.scheduler_service.sampling.rows import SamplingRows, sampling_rows
from quartet.scheduler_service.sampling.state import settings_of


def rows_of(count: int = 1, **params: float) -> SamplingRows:
    return sampling_rows([settings_of(SamplingParams(**params), seed=0)] * count, [1] * count)


def floats(data: bytes) -> torch.Tensor:
    return torch.tensor(array("f", data))


def close(data: bytes, expected: torch.Tensor) -> None:
    torch.testing.assert_close(floats(data), expected.flatten(), atol=1e-5, rtol=1e-5)


def check(found: Logprobs, logits: torch.Tensor, ids: list[int], options: LogprobOptions) -> None:
    expected = torch.log_softmax(logits, 1)  # (rows, vocab)
    assert list(unpack_ids(found.ids)) == ids
    close(found.values, expected.gather(1, torch.tensor(ids).unsqueeze(1)))
    best = expected.topk(options.top, 1) if options.top else None
    close(found.top_values, best.values if best else torch.empty(0))
    assert list(unpack_ids(found.top_ids)) == (best.indices.flatten().tolist() if best else [])
    close(found.asked_values, expected[:, options.token_ids or []])


def test_each_row_gets_what_its_request_asked_for():
    logits = torch.randn(5, 700)
    tokens = [3, 1, 4, 1, 5]
    options = [
        LogprobOptions(),
        None,
        LogprobOptions(top=3),
        LogprobOptions(top=1, token_ids=[9, 0]),
        LogprobOptions(token_ids=[9, 0]),
    ]
    found = output_logprobs(logits, torch.tensor(tokens), options, rows_of(5)).by_row()
    assert found[1] is None
    for row, option in enumerate(options):
        if option is not None:
            check(found[row], logits[row : row + 1], [tokens[row]], option)


def test_a_request_may_have_the_logits_of_its_ids_beside_one_that_has_logprobs():
    logits = torch.randn(3, 700)
    asked = {"token_ids": [9, 0]}
    options = [LogprobOptions(**asked, raw=True), LogprobOptions(**asked), LogprobOptions(**asked, raw=True)]
    found = output_logprobs(logits, torch.tensor([3, 1, 4]), options, rows_of(3)).by_row()
    close(found[0].asked_values, logits[0, [9, 0]])
    close(found[2].asked_values, logits[2, [9, 0]])
    check(found[1], logits[1:2], [1], options[1])
    close(found[0].values, torch.log_softmax(logits[0], 0)[3])


def test_nobody_asking_costs_nothing_and_gives_nothing():
    assert output_logprobs(torch.empty(2, 0), torch.zeros(2), [None, None], rows_of(2)).by_row() == [None, None]


def test_a_masked_token_has_minus_infinity():
    logits = torch.zeros(1, 4)
    logits[0, 2] = -torch.inf
    (found,) = output_logprobs(logits, torch.tensor([0]), [LogprobOptions(token_ids=[2])], rows_of()).by_row()
    assert floats(found.asked_values).tolist() == [-torch.inf]
    close(found.values, torch.tensor([-1.0986123]))


def test_prompt_logprobs_of_blocks_are_those_of_the_whole():
    head = torch.randn(32, 600)
    hidden = torch.randn(100, 32)
    ids = torch.randint(0, 600, (100,))
    options = LogprobOptions(start=0, top=2, token_ids=[7, 8, 9])
    sizes = []

    def to_logits(rows: torch.Tensor) -> torch.Tensor:
        sizes.append(len(rows))
        return rows @ head

    found = prompt_logprobs(hidden, ids, to_logits, module.BLOCK_BYTES // (4 * 30), options)
    assert sizes == [30, 30, 30, 10]
    check(found, hidden @ head, ids.tolist(), options)


def test_a_row_has_the_same_bits_alone_and_among_others_however_many_threads_there_are():
    logits, threads = torch.randn(12, 152_000) * 3, torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        together = log_of_sums(logits)
        assert all(torch.equal(log_of_sums(logits[i : i + 1]), together[i : i + 1]) for i in range(12))
        assert all(torch.equal(log_of_sums(logits[i : i + 3]), together[i : i + 3]) for i in range(10))
    finally:
        torch.set_num_threads(threads)


def test_entropy_is_that_of_the_whole_distribution():
    logits = torch.randn(3, 700)
    logits[1, 5:] = -torch.inf
    options = [LogprobOptions(entropy=True)] * 3
    found = output_logprobs(logits, torch.tensor([1, 2, 3]), options, rows_of(3)).by_row()
    for row, scores in enumerate(found):
        close(scores.entropies, torch.distributions.Categorical(logits=logits[row]).entropy())


def test_support_is_what_the_filters_leave():
    logits = torch.tensor([[4.0, 3.0, 2.0, 1.0, 0.0]]).log()
    for params, ids in (({"top_k": 3}, [0, 1, 2]), ({"top_k": 4, "top_p": 0.6}, [0, 1]), ({"min_p": 0.4}, [0, 1, 2])):
        (found,) = output_logprobs(
            logits, torch.tensor([1]), [LogprobOptions(support=True)], rows_of(**params)
        ).by_row()
        assert (list(unpack_ids(found.support_counts)), list(unpack_ids(found.support_ids))) == ([len(ids)], ids)
        close(found.support_values, torch.tensor([3.0 / sum(4.0 - i for i in ids)]).log())


def test_support_of_the_best_token_is_that_token():
    options = [LogprobOptions(support=True)]
    (found,) = output_logprobs(torch.randn(1, 9), torch.tensor([7]), options, rows_of(temperature=0.0)).by_row()
    assert (list(unpack_ids(found.support_ids)), floats(found.support_values).tolist()) == ([7], [0.0])
