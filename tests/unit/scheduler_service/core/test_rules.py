import pytest

from quartet.runtime.errors import RequestError
from quartet.runtime.messages import LogprobOptions, Request, Tokenized
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.core.rules import PlannerConfig, sequence_of
from tests.stepper import config, tokenized


def refusal(message: Tokenized, settings: PlannerConfig) -> str:
    with pytest.raises(RequestError) as caught:
        sequence_of(message, settings, 0.0)
    assert caught.value.kind.status == 400
    return caught.value.message


SMALL = config(context_length=10, total_pages=8)
WIDE = config(context_length=10, total_pages=100)


def test_an_empty_prompt_is_refused() -> None:
    assert refusal(tokenized("a", []), WIDE) == "input_ids cannot be empty."


def test_a_prompt_as_long_as_the_context_is_refused() -> None:
    assert refusal(tokenized("a", range(10), None), WIDE) == (
        "The input (10 tokens) is longer than the model's context length (10 tokens)."
    )


def test_a_prompt_that_fills_the_context_can_be_scored_or_embedded() -> None:
    assert sequence_of(tokenized("a", range(10), 0), WIDE, 0.0).limit == 0
    assert sequence_of(tokenized("a", range(10), task="embed"), WIDE, 0.0).limit == 0


def test_prompt_and_output_over_the_context_are_refused_with_the_sum() -> None:
    assert refusal(tokenized("a", range(6), 5), WIDE) == (
        "Requested token count exceeds the model's maximum context length of 10 tokens. You requested a total of "
        "11 tokens: 6 tokens from the input messages and 5 tokens for the completion. Please reduce the number of "
        "tokens in the input messages or the completion to fit within the limit."
    )


def test_output_that_does_not_fit_is_clipped_where_the_operator_wants_it() -> None:
    clipping = config(context_length=10, total_pages=100, clips_output=True)
    assert sequence_of(tokenized("a", range(6), 5), clipping, 0.0).limit == 4


def test_output_that_does_not_fit_is_clipped_where_the_request_says_so() -> None:
    asked = tokenized("a", range(6), 5)
    asked.request.clips_output = True
    assert sequence_of(asked, WIDE, 0.0).limit == 4


def test_a_request_that_exceeds_the_context_gets_its_error_code() -> None:
    for message, settings in (
        (tokenized("a", range(10), None), WIDE),
        (tokenized("a", range(6), 5), WIDE),
        (tokenized("a", range(8), 1), SMALL),
    ):
        with pytest.raises(RequestError) as caught:
            sequence_of(message, settings, 0.0)
        assert caught.value.code == "context_length_exceeded"


def test_the_default_output_limit_is_lowered_because_the_client_may_not_have_chosen_it() -> None:
    assert sequence_of(tokenized("a", range(6), 128), WIDE, 0.0).limit == 4


def test_a_prompt_that_can_never_fit_the_pool_is_refused() -> None:
    assert refusal(tokenized("a", range(8), 1), SMALL) == (
        "Input length (8 tokens) exceeds the maximum allowed length (7 tokens). "
        "Use a shorter input or enable --allow-auto-truncate."
    )


def test_output_is_clipped_to_what_the_pool_can_hold_for_one_request() -> None:
    assert sequence_of(tokenized("a", range(5), 5), SMALL, 0.0).limit == 3


@pytest.mark.parametrize("token", [1000, -1])
def test_ids_outside_the_vocabulary_are_refused(token: int) -> None:
    assert refusal(tokenized("a", [5, token]), WIDE).startswith(f"The input_ids [{token}] contains values ")
    assert refusal(tokenized("a", [5], resume=[token]), WIDE).startswith(f"The input_ids [{token}] contains values ")


def test_placeholders_of_float_prompts_are_not_looked_up() -> None:
    assert sequence_of(tokenized("a", [5000], embeds=bytes(4)), WIDE, 0.0).prompt_len == 1


def test_logprobs_must_start_within_the_prompt() -> None:
    assert refusal(tokenized("a", [5, 6], logprobs=LogprobOptions(start=3)), WIDE) == (
        "logprob_start_len, (3) is higher than the number of input tokens (2). Please use a smaller logprob_start_len."
    )


def test_asked_logprob_ids_must_be_in_the_vocabulary() -> None:
    assert refusal(tokenized("a", [5], logprobs=LogprobOptions(token_ids=[3, 1000])), WIDE) == (
        "token_ids_logprob contains out-of-vocabulary token id 1000; valid range is [0, 1000)."
    )


def test_a_torn_id_array_is_refused() -> None:
    message = Tokenized(request=Request(rid="a", params=SamplingParams()), prompt_ids=b"12345")
    assert refusal(message, WIDE) == "input_ids are not whole int32 values."
