"""--enable-deterministic-inference on the CPU: the bits of an answer depend on its request alone."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from quartet.runtime.errors import StartupError
from quartet.runtime.messages import pack_ids
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.model import deterministic
from tests.engine import ALL_LOGPROBS, Answer, Engine
from tests.model import tiny

DRAW = random.Random(1)
LONG = [DRAW.randrange(4, 300) for _ in range(60)]
PROMPTS = [
    *([DRAW.randrange(4, 300) for _ in range(length)] for length in (3, 45, 130, 20)),
    *([*LONG, 9, 8, 7, i] for i in range(4, 10)),  # enough of one beginning to be attended to together
    [7, 8, 9, 10] * 8,
]
PARAMS = [SamplingParams(temperature=i % 2, max_new_tokens=12, ignore_eos=True) for i in range(len(PROMPTS))]
WAYS: dict[str, dict[str, Any]] = {
    "in chunks": {"chunked_prefill_size": 17},
    "on large pages": {"page_size": 16, "chunked_prefill_size": 50},
    "with little memory": {"max_total_tokens": 540},
    "with drafts": {"speculative_algorithm": "NGRAM", "speculative_ngram_min_match_window_size": 1},
}


def engine(directory: Path, **settings: Any) -> Engine:
    return Engine(directory, enable_deterministic_inference=True, **settings)


def bits(answer: Answer) -> tuple[Any, ...]:
    assert answer.logprobs and answer.input_logprobs
    return answer.ids, answer.logprobs.values, answer.input_logprobs.values


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen2_moe", "cohere2", "gpt_oss", "gemma3n", "gemma4"])
def test_an_answer_has_the_same_bits_alone_and_in_any_company(family, dtype, tmp_path):
    assert_same_bits(tiny.build(family, tmp_path), dtype)


@pytest.mark.parametrize("family", ["qwen3", "gemma3"])
def test_kernels_for_wide_heads_give_the_same_bits_in_any_company(family, tmp_path):
    assert_same_bits(tiny.build(family, tmp_path, hidden_size=128, head_dim=32), "bfloat16")


def assert_same_bits(directory: Path, dtype: str) -> None:
    """Every prompt alone has the answer that it has in all the other ways."""
    expected = []
    for prompt, params in zip(PROMPTS, PARAMS, strict=True):
        alone = engine(directory, dtype=dtype, disable_radix_cache=True)
        expected += map(bits, alone.generate([prompt], params, seed=3, logprobs=ALL_LOGPROBS))
    for way, settings in WAYS.items():
        served = engine(directory, dtype=dtype, **settings)
        answers = served.generate(PROMPTS, PARAMS, seed=3, logprobs=ALL_LOGPROBS)
        assert list(map(bits, answers)) == expected, way
        assert any(answer.retractions for answer in answers) == (way == "with little memory")
        assert (served.planner.stats.correct_drafts > 0) == (way == "with drafts")


PENALTIES = [
    SamplingParams(temperature=0.9, max_new_tokens=12, ignore_eos=True),
    SamplingParams(temperature=0.9, max_new_tokens=12, ignore_eos=True, top_k=20, frequency_penalty=0.7),
    SamplingParams(temperature=0.9, max_new_tokens=12, ignore_eos=True, presence_penalty=0.5, repetition_penalty=1.3),
    SamplingParams(temperature=0, max_new_tokens=12, min_new_tokens=10, frequency_penalty=-1.5),
]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("params", PENALTIES)
def test_an_answer_that_was_interrupted_goes_on_with_the_same_bits(params, dtype, tmp_path):
    directory = tiny.build("qwen3", tmp_path)
    whole = engine(directory, dtype=dtype).generate(PROMPTS[:1], params, seed=3, logprobs=ALL_LOGPROBS)[0]
    for cut in (1, 5, 11):
        again = engine(directory, dtype=dtype)
        rid = again.add(PROMPTS[0], params, seed=3, logprobs=ALL_LOGPROBS, resume_ids=pack_ids(whole.ids[:cut]))
        again.run()
        assert again.answers[rid].ids == whole.ids[cut:]
        assert again.answers[rid].logprobs.values == whole.logprobs.values[cut * 4 :]


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (deterministic.sigmoid, torch.sigmoid),
        (deterministic.silu, F.silu),
        (deterministic.gelu, F.gelu),
        (deterministic.gelu_tanh, lambda x: F.gelu(x, approximate="tanh")),
    ],
    ids=["sigmoid", "silu", "gelu", "gelu_tanh"],
)
def test_an_activation_gives_an_element_the_same_bits_wherever_it_lies(ours, theirs):
    for width in (1, 24, 63, 896):
        x = torch.randn(70, 2 * width)[:, :width] * 3
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-5, atol=3e-6)
        for rows in (1, 2, 17, 69):
            assert torch.equal(ours(x[1 : 1 + rows]), ours(x)[1 : 1 + rows])


def test_a_model_that_cannot_keep_the_promise_is_refused_at_the_start(tmp_path):
    with pytest.raises(StartupError, match="--enable-deterministic-inference needs a causal language model"):
        engine(tiny.build("gpt2", tmp_path))
