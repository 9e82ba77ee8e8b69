"""Adapters on the fused operations, in torch, on the CPU: each family against models into which they were merged."""

from pathlib import Path
from typing import Any

import pytest

from quartet.runtime.messages import LogprobOptions
from quartet.runtime.model_files import model_info
from quartet.runtime.sampling import SamplingParams
from quartet.scheduler_service.execution.device_adapters import DeviceAdapters
from quartet.scheduler_service.execution.memory_saver import MemorySaver
from quartet.scheduler_service.execution.worker import Worker
from quartet.scheduler_service.weights.parameters import Weights
from quartet.scheduler_service.weights.update import Updates
from tests.configs import resolved
from tests.engine import DEFAULTS, Engine, floats
from tests.model import test_adapters
from tests.model.test_adapters import GREEDY, NAMES, PROMPT


def fused(directory: Path, **settings: Any) -> Engine:
    settings = {**DEFAULTS, "device": "cpu", **settings}
    config = resolved(model_path=str(directory), model_dir=str(directory), **settings)
    worker = Worker(config, model_info.load(config), implementation="torch")
    return Engine(directory, worker=worker, **settings)


class Fused(test_adapters.Served):
    """As Served, on the fused operations."""

    def start(self, **settings: Any) -> Engine:
        return fused(self.base, **{"max_lora_rank": 64, "max_loras_per_batch": 4, **settings})


@pytest.mark.parametrize("family", ["qwen2", "phi3", "gemma2", "cohere2", "qwen2_moe", "glm4_moe"])
def test_adapters_mixed_with_the_base_give_what_merged_models_give(family: str, tmp_path: Path) -> None:
    served = Fused(family, tmp_path)
    assert isinstance(served.store, DeviceAdapters)
    for name, answer in zip(NAMES * 2, served.ask(NAMES * 2), strict=True):
        served.check(answer, name)
    replays = served.engine.worker.steps.graphs.misses
    assert any(key.adapters for key in replays), "decode steps ran on the buffers"


def test_more_adapters_than_slots_take_turns(tmp_path: Path) -> None:
    served = Fused("qwen2", tmp_path, max_loras_per_batch=2)
    placed = served.store.pool.slot_of
    assert len(served.store.loaded) == 4 and len(placed) == 2
    for name, answer in zip(NAMES * 2, served.ask(NAMES * 2), strict=True):
        served.check(answer, name)
    assert len(placed) == 2


def test_drafts_are_verified_with_the_adapter_of_their_request(tmp_path: Path) -> None:
    ngram = {"speculative_algorithm": "NGRAM", "speculative_num_draft_tokens": 3}
    served = Fused("qwen2", tmp_path, **ngram)
    biased = SamplingParams(temperature=0.0, max_new_tokens=10, ignore_eos=True, logit_bias={"9": 50.0})
    rids = [served.engine.add([5, 9, 9], biased, adapter=name) for name in NAMES]
    rids += [served.engine.add(PROMPT * 2, GREEDY, adapter=name) for name in NAMES]
    served.engine.run()
    assert served.engine.planner.stats.correct_drafts > 2
    assert all(served.engine.answers[rid].ids == [9] * 10 for rid in rids[: len(NAMES)])
    plain = Fused("qwen2", tmp_path / "plain")
    expected = [answer.ids for answer in plain.ask(NAMES, PROMPT * 2)]
    assert [served.engine.answers[rid].ids for rid in rids[len(NAMES) :]] == expected


def test_steps_without_adapters_are_those_of_a_server_without_them(tmp_path: Path) -> None:
    served = Fused("qwen2", tmp_path)
    served.engine.worker.steps.graphs.misses.clear()
    found = served.ask([""] * 3)
    assert not any(key.adapters for key in served.engine.worker.steps.graphs.misses)
    expected = fused(served.base, max_running_requests=16).generate([PROMPT] * 3, GREEDY, logprobs=LogprobOptions())
    assert [floats(a.logprobs.values) for a in found] == [floats(a.logprobs.values) for a in expected]


def test_adapters_stay_where_the_weights_could_not_be_released(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = Fused("qwen2", tmp_path)
    worker = served.engine.worker
    updates = Updates(worker.model.weights, served.engine.config, str(tmp_path))
    saver = MemorySaver(updates, worker.cache, True, worker.forget_graphs, adapters=worker.adapter_pool)

    def fail(*of: object) -> None:
        raise MemoryError("the host is full")

    monkeypatch.setattr(Weights, "staging", fail)
    with pytest.raises(MemoryError, match="the host is full"):
        saver.release(["weights"])
    assert not saver.released
    for name, answer in zip(NAMES, served.ask(NAMES), strict=True):
        served.check(answer, name)
