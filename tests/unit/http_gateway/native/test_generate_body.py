"""Bodies of /generate: shapes, broadcasting, copies, and the words of every refusal."""

import json
from array import array
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quartet.http_gateway.generation.intake import Job, Rules
from quartet.http_gateway.native.generate_body import FIELDS, REFUSED, GenerateBody, to_job
from quartet.runtime.errors import RequestError
from quartet.runtime.messages import LogprobOptions, unpack_ids
from quartet.runtime.sampling import SamplingParams

RULES = Rules(vocab_size=100, hidden_size=2)


def read(rules: Rules = RULES, **fields: Any) -> tuple[Job, bool]:
    return to_job(msgspec.json.decode(msgspec.json.encode(fields), type=GenerateBody), rules)


def refusal(rules: Rules = RULES, **fields: Any) -> str:
    with pytest.raises(RequestError) as error:
        read(rules, **fields)
    assert error.value.kind.status == 400
    return error.value.message


@pytest.mark.parametrize(
    ("fields", "single", "size"),
    [
        ({"text": "a"}, True, 1),
        ({"input_ids": [1, 2]}, True, 1),
        ({"text": ["a"]}, False, 1),
        ({"input_ids": [[1, 2]]}, False, 1),
        ({"text": "a", "sampling_params": {"n": 4}}, False, 4),
        ({"text": ["a", "b"], "sampling_params": {"n": 2}}, False, 4),
    ],
)
def test_shape_of_the_answer(fields: dict[str, Any], single: bool, size: int) -> None:
    job, one = read(**fields)
    assert (one, len(job.requests)) == (single, size)


def test_copies_stand_side_by_side_with_rids_and_seeds_of_their_own() -> None:
    job, _ = read(text=["a", "b"], sampling_params={"n": 2, "sampling_seed": 7}, rid="r")
    assert [item.text for item in job.requests] == ["a", "a", "b", "b"]
    assert [item.request.seed for item in job.requests] == [7, 8, 7, 8]
    assert len({item.request.rid for item in job.requests}) == 4
    assert job.parents == ["r"] * 4
    assert [(item.text, item.request.params.max_new_tokens) for item in job.warm] == [("a", 0), ("b", 0)]


@pytest.mark.parametrize(
    ("rules", "extra"),
    [
        (Rules(vocab_size=100, hidden_size=2, prefix_cache=False), {}),
        (RULES, {"return_logprob": True, "logprob_start_len": 0}),
    ],
)
def test_copies_are_not_warmed_where_the_cache_would_not_be_used(rules: Rules, extra: dict[str, Any]) -> None:
    job, _ = read(rules, text="a", sampling_params={"n": 2}, **extra)
    assert job.warm == []


def test_the_largest_seed_wraps_round_for_copies() -> None:
    job, _ = read(text="a", sampling_params={"n": 2, "sampling_seed": 2**63 - 1})
    assert [item.request.seed for item in job.requests] == [2**63 - 1, -(2**63)]


def test_requests_without_a_seed_get_one() -> None:
    seeds = {read(text="a")[0].requests[0].request.seed for _ in range(8)}
    assert len(seeds) == 8
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_rids_are_kept_numbered_or_drawn() -> None:
    assert [item.request.rid for item in read(text="a", rid="x")[0].requests] == ["x"]
    assert [item.request.rid for item in read(text=["a", "b"], rid="x")[0].requests] == ["x_0", "x_1"]
    assert [item.request.rid for item in read(text=["a", "b"], rid=["p", "q"])[0].requests] == ["p", "q"]
    assert len(read(text="a")[0].requests[0].request.rid) == 32


def test_scalars_hold_for_all_items_and_lists_for_each() -> None:
    job, _ = read(
        text=["a", "b"],
        sampling_params=[{"temperature": 0}, {"temperature": 0.5}],
        return_logprob=[True, False],
        top_logprobs_num=3,
        token_ids_logprob=[4, 5],
        extra_key=["k", "l"],
        cache_salt="s",
    )
    first, second = (item.request for item in job.requests)
    assert (first.params.temperature, second.params.temperature) == (0, 0.5)
    assert first.logprobs == LogprobOptions(top=3, token_ids=[4, 5])
    assert second.logprobs is None
    assert (first.extra_key, second.extra_key) == ("ks", "ls")


def test_null_means_the_default_except_for_max_new_tokens() -> None:
    params = read(text="a", sampling_params={"temperature": None, "max_new_tokens": None})[0].requests[0].request.params
    assert (params.temperature, params.max_new_tokens) == (1.0, None)
    assert read(text="a", sampling_params=None)[0].requests[0].request.params.max_new_tokens == 128


def test_preferred_parameters_lie_under_the_requests_own() -> None:
    rules = Rules(vocab_size=100, hidden_size=2, preferred={"temperature": 0.7, "top_p": 0.5})
    params = read(rules, text="a", sampling_params={"top_p": 0.9})[0].requests[0].request.params
    assert (params.temperature, params.top_p) == (0.7, 0.9)


@pytest.mark.parametrize("name", ["json_schema", "structural_tag"])
def test_a_grammar_written_in_json_may_be_the_object_itself(name: str) -> None:
    grammar = {"type": "object", "properties": {"b": {"type": "integer"}, "a": {"type": "null"}}}
    job, _ = read(text="a", sampling_params={name: grammar})
    assert job.requests[0].request.params.grammar == (name, json.dumps(grammar))
    preferring = Rules(vocab_size=100, hidden_size=2, preferred={name: grammar})
    assert read(preferring, text="a")[0].requests[0].request.params.grammar == (name, json.dumps(grammar))


@pytest.mark.parametrize("name", ["json_schema", "structural_tag"])
def test_a_list_is_no_grammar(name: str) -> None:
    with pytest.raises(msgspec.ValidationError, match=name):
        read(text="a", sampling_params={name: [{}]})


def test_embeds_become_float32_rows_where_the_radix_cache_is_off() -> None:
    rules = Rules(vocab_size=100, hidden_size=2, prefix_cache=False)
    job, single = read(rules, input_embeds=[[1.0, 2.0], [3.0, 4.0]])
    assert single
    assert array("f", job.requests[0].embeds).tolist() == [1, 2, 3, 4]
    assert len(read(rules, input_embeds=[[[1, 2]], [[3, 4]]])[0].requests) == 2
    assert "rows of 2 numbers" in refusal(rules, input_embeds=[[1.0]])
    assert "rows of 2 numbers" in refusal(rules, input_embeds=[[[1.0, 2.0], 3.0]])
    assert "--disable-radix-cache" in refusal(input_embeds=[[1.0, 2.0]])


def test_ids_travel_as_int32() -> None:
    assert unpack_ids(read(input_ids=[1, 99])[0].requests[0].input_ids).tolist() == [1, 99]


def test_unknown_and_ignorable_keys_are_ignored() -> None:
    assert read(text="a", model="x", session_id="s", routing_key="k", no_logs=True)[1]


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_supported_is_named(name: str) -> None:
    assert refusal(text="a", **{name: "x"}) == f"{name} is not supported."
    assert read(text="a", **{name: None})[1]
    assert read(text="a", **{name: [None]})[1]


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "Either text, input_ids or input_embeds should be provided."),
        ({"text": "a", "input_ids": [1]}, "Either text, input_ids or input_embeds should be provided."),
        ({"input_ids": []}, "input_ids cannot be empty."),
        ({"input_ids": [[1], []]}, "input_ids cannot be empty."),
        ({"text": []}, "text cannot be empty."),
        ({"input_ids": [[1], 2]}, "input_ids should be a list of lists for batch processing."),
        ({"input_ids": [100]}, "greater than the vocab size (100)"),
        ({"input_ids": [-1]}, "greater than the vocab size (100)"),
        ({"input_ids": [2**40]}, "greater than the vocab size (100)"),
        (
            {"text": ["a", "b"], "rid": ["x"]},
            "The specified rids length mismatch with the batch_size for batch processing.",
        ),
        ({"text": "a", "rid": 5}, "The rid should be a string or a list of strings."),
        ({"text": ["a", "b"], "rid": ["x", "x"]}, "Duplicate request IDs detected within the request: ['x']"),
        ({"text": "a", "rid": "x" * 257}, "at most 256 characters"),
        (
            {"text": ["a", "b"], "sampling_params": [{"n": 1}, {"n": 2}]},
            "The parallel_sample_num should be the same for all samples in sample params.",
        ),
        ({"text": ["a"], "sampling_params": {"n": 2}, "top_logprobs_num": [1]}, "top_logprobs_num should not be"),
        ({"text": "a", "sampling_params": {"temprature": 1}}, "`temprature`: did you mean `temperature`?"),
        ({"text": "a", "sampling_params": {"max_tokens": 1}}, "`max_tokens`: did you mean `max_new_tokens`?"),
        ({"text": "a", "sampling_params": {"seed": 1}}, "`seed`: did you mean `sampling_seed`?"),
        ({"text": "a", "sampling_params": {"x" * 9000: 1}}, "x`."),
        ({"text": "a", "sampling_params": {"temperature": -1}}, "temperature must be a non-negative finite number"),
        ({"text": "a", "sampling_params": {"custom_params": {}}}, "custom_params"),
        ({"text": "a", "sampling_params": {"logit_bias": {"100": 1}}}, "logit_bias must has keys in [0, 99], got 100."),
        ({"text": "a", "sampling_params": {"logit_bias": {"9" * 5000: 1}}}, "logit_bias must has keys in [0, 99], got"),
        ({"text": "a", "sampling_params": {"logit_bias": {"5": -3.5e38}}}, "logit_bias must have values in [-3.40"),
        ({"text": ["a", "b"], "sampling_params": [{}]}, "sampling_params has 1 items for a batch of 2."),
        ({"text": "a", "return_logprob": [True]}, "return_logprob should not be a list for a single prompt."),
        ({"text": "a", "return_logprob": True, "top_logprobs_num": 129}, "top_logprobs_num must be in [0, 100]"),
        ({"text": "a", "return_logprob": True, "logprob_start_len": -2}, "logprob_start_len must be -1 or"),
        (
            {"text": "a", "return_logprob": True, "token_ids_logprob": [100]},
            "token_ids_logprob contains out-of-vocabulary token id 100; valid range is [0, 100).",
        ),
        ({"text": "a", "data_parallel_rank": 1}, "data_parallel_rank must be 0"),
        ({"text": "a", "priority": 1}, "--enable-priority-scheduling"),
        ({"text": "a", "extra_key": "k" * 1025}, "extra_key may have at most 1024 characters."),
        ({"text": ["a"] * 1025}, "at most 1024 prompts"),
    ],
)
def test_refusals(fields: dict[str, Any], words: str) -> None:
    assert words in refusal(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"text": "a"},
        {"input_ids": [1], "sampling_params": {"stop": "x"}},
        {"input_ids": [1], "sampling_params": {"stop_regex": "x"}},
        {"input_ids": [1], "sampling_params": {"min_new_tokens": 1}},
    ],
)
def test_text_is_refused_where_there_is_no_tokenizer(fields: dict[str, Any]) -> None:
    rules = Rules(vocab_size=100, hidden_size=2, tokenizer=False)
    assert "--skip-tokenizer-init" in refusal(rules, **fields)
    assert read(rules, input_ids=[1])[1]


def test_wrong_json_types_are_schema_errors() -> None:
    with pytest.raises(msgspec.ValidationError, match="temperature"):
        read(text="a", sampling_params={"temperature": "hot"})


SCALARS = st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=3)
ANYTHING = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
)
PARAMETERS = st.dictionaries(st.sampled_from(sorted(msgspec.structs.asdict(SamplingParams()))), ANYTHING, max_size=3)
BODIES = st.dictionaries(st.sampled_from(FIELDS[:16]), ANYTHING | PARAMETERS, max_size=5)


@given(BODIES)
def test_no_body_raises_anything_but_a_refusal_or_a_schema_error(body: dict[str, Any]) -> None:
    for rules in (RULES, Rules(vocab_size=100, hidden_size=2, prefix_cache=False, tokenizer=False)):
        try:
            job, _ = read(rules, **{"text": "a", **body})
        except (RequestError, msgspec.ValidationError):
            continue
        assert job.requests


WITH_EXPERTS = Rules(vocab_size=100, hidden_size=2, routed_experts=True)


def test_routed_experts_are_asked_for_prompt_by_prompt() -> None:
    job, _ = read(WITH_EXPERTS, text=["a", "b"], return_routed_experts=[True, False], routed_experts_start_len=[5, 0])
    asked = [(item.request.return_routed_experts, item.request.routed_experts_start_len) for item in job.requests]
    assert asked == [(True, 5), (False, 0)]


def test_copies_that_want_routed_experts_compute_their_prompt_each() -> None:
    job, _ = read(WITH_EXPERTS, text="a", sampling_params={"n": 2}, return_routed_experts=True)
    assert job.warm == [] and all(item.request.return_routed_experts for item in job.requests)


def test_routed_experts_are_refused_where_the_server_was_not_told_to_return_them() -> None:
    assert "Please set `--enable-return-routed-experts`" in refusal(text="a", return_routed_experts=True)
    assert "at least 0" in refusal(WITH_EXPERTS, text="a", return_routed_experts=True, routed_experts_start_len=-1)
    job, _ = read(text="a", return_routed_experts=False)
    assert not job.requests[0].request.return_routed_experts


def test_hidden_states_are_asked_for_prompt_by_prompt_and_computed_for_each_copy() -> None:
    rules = Rules(vocab_size=100, hidden_size=2, hidden_states=True)
    job, _ = read(rules, text=["a", "b"], return_hidden_states=[True, False])
    assert [item.request.return_hidden_states for item in job.requests] == [True, False]
    job, _ = read(rules, text="a", sampling_params={"n": 2}, return_hidden_states=True)
    assert job.warm == [] and all(item.request.return_hidden_states for item in job.requests)
    assert "Please set `--enable-return-hidden-states`" in refusal(text="a", return_hidden_states=True)
