from array import array

import pytest

from quartet.runtime import limits
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import LogprobOptions
from quartet.runtime.vocabulary import check_input_ids, check_logprob_options, check_logprob_start

VOCAB = 1000


def test_ids_of_the_vocabulary_pass() -> None:
    check_input_ids(array("i", [0, VOCAB - 1]), VOCAB)
    check_input_ids(array("i"), VOCAB)


@pytest.mark.parametrize("outside", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_named(outside: int) -> None:
    with pytest.raises(RequestError, match=rf"The input_ids \[{outside}\] contains values") as refused:
        check_input_ids(array("i", [5, outside, 6]), VOCAB)
    assert refused.value.field == "input_ids"


@pytest.mark.parametrize(
    ("options", "field"),
    [
        (LogprobOptions(top=-1), "top_logprobs_num"),
        (LogprobOptions(top=limits.MAX_TOP_LOGPROBS + 1), "top_logprobs_num"),
        (LogprobOptions(start=-2), "logprob_start_len"),
        (LogprobOptions(token_ids=[VOCAB]), "token_ids_logprob"),
        (LogprobOptions(token_ids=[-1]), "token_ids_logprob"),
        (LogprobOptions(token_ids=[0] * (limits.MAX_TOKEN_IDS_LOGPROB + 1)), "token_ids_logprob"),
    ],
)
def test_logprob_options_out_of_range_name_their_field(options: LogprobOptions, field: str) -> None:
    with pytest.raises(RequestError) as refused:
        check_logprob_options(options, VOCAB)
    assert refused.value.field == field


def test_logprobs_may_start_at_the_end_of_the_prompt_and_not_behind_it() -> None:
    check_logprob_start(LogprobOptions(start=2), 2)
    with pytest.raises(RequestError, match="higher than the number of input tokens"):
        check_logprob_start(LogprobOptions(start=3), 2)
