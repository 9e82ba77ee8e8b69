"""Deterministic inference on the Triton kernels: an answer has the same bits, whatever shares its steps."""

from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.worker import Worker
from tests.configs import resolved
from tests.engine import ALL_LOGPROBS, Answer, Engine
from tests.kernels_interpreter.test_decoder import SETTINGS, SMALL
from tests.model import tiny

PROMPTS = [[5, 9, 40, 7, 11], [8, 200], [77]]
PARAMS = [SamplingParams(temperature=t, max_new_tokens=2, ignore_eos=True) for t in (1.0, 0.7, 0.0)]


def answers(directory: Path, prompts: list[list[int]], params: list[SamplingParams], **settings: Any) -> list[Answer]:
    settings = {**SETTINGS, "enable_deterministic_inference": True, **settings}
    config = resolved(model_path=str(directory), model_dir=str(directory), max_running_requests=5, **settings)
    worker = Worker(config, model_info.load(config), implementation="triton")
    return Engine(directory, worker=worker, **settings).generate(prompts, params, seed=7, logprobs=ALL_LOGPROBS)


@pytest.mark.parametrize("family", ["qwen2", "qwen2_moe"])
def test_an_answer_has_the_same_bits_alone_and_in_chunks_among_others(family, tmp_path):
    directory = tiny.build(family, tmp_path, **SMALL)
    together = answers(directory, PROMPTS, PARAMS, chunked_prefill_size=4, page_size=8)
    (alone,) = answers(directory, PROMPTS[:1], PARAMS[:1])
    assert alone.ids == together[0].ids
    assert alone.logprobs.values == together[0].logprobs.values
    assert alone.input_logprobs.values == together[0].input_logprobs.values
