"""The fused decoder on the Triton kernels themselves: what binds them is right, whatever the device."""

from pathlib import Path
from typing import Any

import pytest

from quartet.kernels.ops import resolve
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import Answer, Engine
from tests.model import tiny

SMALL = {"num_hidden_layers": 1, "vocab_size": 300, "max_position_embeddings": 64}
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "page_size": 4,
    "max_total_tokens": 512,
    "device": "cpu",
}
GREEDY = SamplingParams(temperature=0.0, max_new_tokens=2, ignore_eos=True)
DRAWN = SamplingParams(temperature=1.0, top_k=20, top_p=0.9, max_new_tokens=2, ignore_eos=True)


def answers(directory: Path, implementation: Any, prompts: list[list[int]], params: SamplingParams) -> list[Answer]:
    config = resolved(
        model_path=str(directory), model_dir=str(directory), max_running_requests=len(prompts), **SETTINGS
    )
    worker = Worker(config, model_info.load(config), implementation=implementation)
    return Engine(directory, worker=worker, **SETTINGS).generate(prompts, params, seed=7)


@pytest.mark.parametrize(
    ("family", "requests", "params"),
    [("qwen3", 2, DRAWN), ("qwen2", 6, GREEDY), ("qwen2_moe", 2, GREEDY)],
    ids=["few rows, drawn", "more rows", "experts"],
)
def test_the_decoder_answers_alike_on_triton_and_on_torch(family, requests, params, tmp_path):
    directory = tiny.build(family, tmp_path, **SMALL)
    prompts = [[5 + i, 9, 40 + i, 7][: 2 + i % 3] for i in range(requests)]
    expected = answers(directory, "torch", prompts, params)
    found = answers(directory, "triton", prompts, params)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


@pytest.mark.parametrize(
    ("family", "overrides"),
    [("olmo2", {}), ("cohere2", {"layer_types": ["sliding_attention"]}), ("glm4_moe", {"first_k_dense_replace": 0})],
    ids=["norms over all heads", "layer norm, neighbours rotated, one norm for both blocks", "scored experts"],
)
def test_what_the_kernels_do_not_know_is_computed_beside_them(family, overrides, tmp_path):
    directory = tiny.build(family, tmp_path, **SMALL, **overrides)
    prompts = [[5, 9, 40, 7], [6, 9]]
    expected = Engine(directory, **SETTINGS).generate(prompts, GREEDY, seed=7)
    found = answers(directory, "triton", prompts, GREEDY)
    assert [answer.ids for answer in found] == [answer.ids for answer in expected]


@pytest.mark.parametrize("family", ["lfm2", "qwen3_5", "kimi_linear", "falcon_h1"])
def test_recurrent_layers_decode_on_triton_as_on_torch(family, tmp_path):
    directory = tiny.build(family, tmp_path, vocab_size=300)
    prompts = [[5, 9, 40, 7], [6, 9]]
    expected, found = (Engine(directory, **SETTINGS) for _ in range(2))
    for engine, ops in ((expected, None), (found, resolve("cpu", "triton"))):
        engine.worker.state_cache.kernels, engine.worker.state_cache.ops = None, ops
    answers = [engine.generate(prompts, GREEDY, seed=7) for engine in (expected, found)]
    assert [answer.ids for answer in answers[0]] == [answer.ids for answer in answers[1]]


def test_drafts_are_verified_on_triton_as_without_them(tmp_path):
    directory = tiny.build("qwen3", tmp_path, **SMALL)
    ngram: dict[str, Any] = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 3}
    params = SamplingParams(temperature=0.0, max_new_tokens=8, ignore_eos=True, logit_bias={"9": 50.0})
    config = resolved(model_path=str(directory), model_dir=str(directory), max_running_requests=1, **SETTINGS, **ngram)
    worker = Worker(config, model_info.load(config), implementation="triton")
    engine = Engine(directory, worker=worker, **SETTINGS, **ngram)
    assert engine.generate([[5, 9, 9]], params)[0].ids == [9] * 8
    assert engine.planner.stats.correct_drafts > 2
