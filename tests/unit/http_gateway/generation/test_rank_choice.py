"""Which scheduler a client has chosen, and output that it has from another server."""

import pytest

from quartet.http_gateway.generation.intake import Job, Rules
from quartet.http_gateway.generation.rank_choice import apply_header, chosen_rank
from quartet.http_gateway.generation.resumed import read_resumed
from quartet.http_gateway.native.generate_body import GenerateBody, to_job
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import Generate, Request, pack_ids
from quartet.runtime.sampling import SamplingParams

RULES = Rules(vocab_size=100, hidden_size=4)
TEN = SamplingParams(max_new_tokens=10)


def test_either_name_chooses_and_they_must_agree():
    assert chosen_rank(GenerateBody(), 4) is None
    assert chosen_rank(GenerateBody(data_parallel_rank=3), 4) == chosen_rank(GenerateBody(routed_dp_rank=3), 4) == 3
    with pytest.raises(RequestError, match="disagree"):
        chosen_rank(GenerateBody(data_parallel_rank=1, routed_dp_rank=2), 4)


@pytest.mark.parametrize("rank", [-1, 4])
def test_a_rank_that_is_not_there_is_refused_by_its_name(rank: int):
    with pytest.raises(RequestError, match=r"routed_dp_rank must be in 0\.\.3, got") as refused:
        chosen_rank(GenerateBody(routed_dp_rank=rank), 4)
    assert refused.value.field == "routed_dp_rank"


def test_the_header_is_for_requests_that_have_chosen_nothing():
    chosen, free = (
        Generate(request=Request(rid="r", params=TEN, wanted_rank=1)),
        Generate(request=Request(rid="s", params=TEN)),
    )
    apply_header([(b"host", b"x"), (b"x-data-parallel-rank", b"3")], Job([chosen, free]), 4)
    assert (chosen.request.wanted_rank, free.request.wanted_rank) == (1, 3)
    for wrong in (b"4", b"-1", b"one", b"9" * 5000):
        with pytest.raises(RequestError, match="X-Data-Parallel-Rank"):
            apply_header([(b"x-data-parallel-rank", wrong)], Job(), 4)


def test_the_prompt_of_copies_is_computed_where_they_are():
    body = GenerateBody(text="a", sampling_params={"n": 2}, data_parallel_rank=1)
    job, _ = to_job(body, Rules(vocab_size=100, hidden_size=4, schedulers=2))
    assert [item.request.wanted_rank for item in [*job.warm, *job.requests]] == [1, 1, 1]


def test_output_that_a_client_has_is_packed():
    assert read_resumed(None, TEN, True, RULES) == read_resumed([], TEN, True, RULES) == b""
    assert read_resumed([5, 6], TEN, True, RULES) == pack_ids([5, 6])


@pytest.mark.parametrize(
    ("ids", "params", "single", "words"),
    [
        ([5], TEN, False, "single prompt"),
        ([5], SamplingParams(n=2), True, "n 1"),
        (list(range(10)), TEN, True, "nothing is left"),
        ([100], TEN, True, "the id 100"),
        ([-1], TEN, True, "the id -1"),
        ([1 << 40], TEN, True, "too large"),
    ],
)
def test_output_that_cannot_be_is_refused(ids: list[int], params: SamplingParams, single: bool, words: str):
    with pytest.raises(RequestError, match=words) as refused:
        read_resumed(ids, params, single, RULES)
    assert refused.value.field == "resume_ids"
