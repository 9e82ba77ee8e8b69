"""Deterministic inference on the Triton kernels: an answer has the same bits, whatever shares its steps."""

from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.worker import Worker
from tests.adapters import write_adapter
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


def test_an_answer_has_the_same_bits_whatever_adapters_the_others_have(tmp_path):
    directory = tiny.build("qwen2", tmp_path / "base", **SMALL)
    settings = {**SETTINGS, "enable_deterministic_inference": True, "enable_lora": True, "max_lora_rank": 16}
    for seed, rank in ((1, 3), (2, 10)):
        write_adapter(directory, tmp_path / f"a{seed}", seed=seed, rank=rank)

    def answers(names: list[str], number: int) -> list[Answer]:
        config = resolved(model_path=str(directory), model_dir=str(directory), max_running_requests=5, **settings)
        worker = Worker(config, model_info.load(config), implementation="triton")
        run_dir = tmp_path / f"run{number}"
        run_dir.mkdir()
        store = worker.load_adapters(config, str(run_dir))
        for name in ("a1", "a2"):
            store.install(name, name, str(tmp_path / name), store.read(tmp_path / name), pinned=False)
        engine = Engine(directory, worker=worker, **settings)
        engine.planner.waiting.set_adapter_versions(store.version_of)
        rids = [engine.add(PROMPTS[0], PARAMS[0], adapter=name, seed=7, logprobs=ALL_LOGPROBS) for name in names]
        engine.run()
        return [engine.answers[rid] for rid in rids]

    names = ["a1", "", "a2", "a1"]
    together = answers(names, 0)
    assert len({answer.logprobs.values for answer in together}) == 3
    for number, name in enumerate(names[:2], 1):
        (alone,) = answers([name], number)
        expected = together[names.index(name)]
        assert (alone.ids, alone.logprobs.values) == (expected.ids, expected.logprobs.values)
        assert alone.input_logprobs.values == expected.input_logprobs.values
